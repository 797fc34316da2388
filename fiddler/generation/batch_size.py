"""How many sequences a batch steps at once: as many as memory allows and as raise its speed. Pure.

Knows numbers of tokens, sequences and seconds; no models or machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

__all__ = ["BatchSize", "batch_size", "first_batch_size", "tokens_per_sequence"]

_SAMPLES = 8  # steps, whose median counts
_GAIN = 1.1  # least gain in tokens a second that justifies a doubled batch size


def first_batch_size(experts: int, used: int) -> int:
    """The batch size at which each expert, or a model without experts, is used eight times a step on average.

    Half of it already reads every expert but one in fifty (e ** -4), so the other half costs little.
    """
    return -(-8 * max(1, experts) // max(1, used))


def tokens_per_sequence(lacking: Sequence[int], max_tokens: int) -> list[int]:
    """How many tokens of each sequence, of the `lacking` not yet computed, go into the next step; `max_tokens` in all.

    A sequence that lacks only one token gets it: it decodes at every step, whatever prompts are read beside it. The
    rest goes to the prompts, first come first served; some may get nothing yet.
    """
    left = max_tokens - lacking.count(1)
    counts = []
    for count in lacking:
        if count == 1:
            counts.append(1)
        else:
            counts.append(max(0, min(count, left)))
            left -= counts[-1]
    return counts


class BatchSize:
    """The number of sequences `now`: doubled as long as that gives more tokens a second, up to `maximum`.

    Only steps count in which every sequence had one token: a step that reads prompts has many tokens anyway.
    """

    def __init__(self, now: int, maximum: int) -> None:
        assert 1 <= now <= maximum, f"{now} of at most {maximum} sequences"
        self.now, self._maximum = now, maximum
        self._before = 0  # the batch size measured last, and its tokens a second
        self._speed = 0.0
        self._seconds: list[float] = []

    @property
    def maximum(self) -> int:
        """The largest number of sequences that `now` may become."""
        return self._maximum

    def measured(self, sequences: int, seconds: float) -> None:
        """Record that a step with one token for each of `sequences` took `seconds`."""
        if sequences != self.now or self.now == self._maximum:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < _SAMPLES:
            return
        speed, self._seconds = self.now / median(self._seconds), []
        if speed < _GAIN * self._speed:
            self.now = self._maximum = self._before
        else:
            self._before, self._speed = self.now, speed
            self.now = min(2 * self.now, self._maximum)

    def limit(self, maximum: int) -> None:
        """Lower the maximum, to no less than 1: memory does not suffice for more sequences."""
        self._maximum = max(1, min(self._maximum, maximum))
        self.now = min(self.now, self._maximum)


def batch_size(parallel: int | None, chunk: int, experts: int, used: int) -> BatchSize:
    """The batch size to begin with: `parallel` for good, or the first one, which grows. At most `chunk` sequences."""
    limit = chunk if parallel is None else min(parallel, chunk)
    first = first_batch_size(experts, used) if parallel is None else limit
    return BatchSize(min(first, limit), limit)
