"""The sequence computed last, for the next prompt that begins with the same tokens. Knows no model and no text.

It has one user at a time: `take` removes the sequence until its user puts it back. So two generations at once never
write to the same keys and values: the second one finds none and computes its whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

from fiddler.gpu.contiguous_kv_cache import ContiguousKVCache
from fiddler.runtime.prefix_cache import common

__all__ = ["LastSequence"]


class LastSequence:
    """Holds one sequence, or none, and the tokens that are in it."""

    def __init__(self) -> None:
        self._sequence: ContiguousKVCache | None = None
        self.tokens: tuple[int, ...] = ()

    def holds(self, sequence: ContiguousKVCache | None) -> bool:
        """Whether this very sequence is held."""
        return sequence is not None and sequence is self._sequence

    def put(self, sequence: ContiguousKVCache, tokens: Sequence[int]) -> None:
        """Hold `sequence` in place of the one before. It holds the first `sequence.length` of `tokens`."""
        assert sequence.length <= len(tokens)
        self._sequence, self.tokens = sequence, tuple(tokens[: sequence.length])

    def take(self, ids: Sequence[int]) -> ContiguousKVCache | None:
        """The sequence, truncated to its common prefix with `ids`, or None where there is none.

        At least one of `ids` is left to compute, for the logits after it.
        """
        sequence = self._sequence
        if sequence is not None:
            sequence.truncate(min(common(self.tokens, ids), max(len(ids) - 1, 0)))
        self.drop()
        return sequence

    def drop(self) -> None:
        """Forget the sequence: its memory is freed, or belongs to the caller of `take`."""
        self._sequence, self.tokens = None, ()
