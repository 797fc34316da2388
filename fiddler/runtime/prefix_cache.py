"""The sequence that was computed last, for the next one that begins with the same tokens. Knows no model and no text.

It is in one hand at a time: who takes it is its only user until it is put back, so two generations at once never
write to the same keys and values; the second one finds nothing and computes anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from fiddler.runtime.kv_cache import KVCache

__all__ = ["PrefixCache", "common"]


class PrefixCache:
    """Holds one sequence, or none, and the tokens that are in it."""

    def __init__(self) -> None:
        self._sequence: KVCache | None = None
        self.tokens: tuple[int, ...] = ()

    def holds(self, sequence: KVCache | None) -> bool:
        """Whether this very sequence is kept."""
        return sequence is not None and sequence is self._sequence

    def put(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Keep `sequence`, and forget the one before. It holds the first of `tokens`, as many as its length says."""
        assert sequence.length <= len(tokens)
        self._sequence, self.tokens = sequence, tuple(tokens[: sequence.length])

    def take(self, ids: Sequence[int]) -> KVCache | None:
        """The kept sequence, cut to what it shares with `ids`, or None where there is none.

        Of `ids` one at least is left to compute, for the logits after it.
        """
        sequence = self._sequence
        if sequence is not None:
            sequence.truncate(min(common(self.tokens, ids), max(len(ids) - 1, 0)))
        self.drop()
        return sequence

    def drop(self) -> None:
        """Forget it: its memory is free, or its next user's."""
        self._sequence, self.tokens = None, ()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens are the same at the beginning of both."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)
