"""How many sequences a batch has at once: what memory allows, and what more of them are worth. Pure.

Knows numbers of tokens, bytes and seconds; not sequences, models or machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

__all__ = ["BatchSize", "first_batch_size", "tokens_per_sequence"]

_SAMPLES = 8  # steps, whose median is taken
_GAIN = 1.1  # in tokens a second, that twice as many sequences must give


def first_batch_size(experts: int, used: int) -> int:
    """So many sequences that each expert is chosen eight times a step on average.

    Half as many read every expert anyway, but for one in fifty (e ** -4); so others among them cost little.
    """
    return -(-8 * experts // used)


def tokens_per_sequence(lacking: Sequence[int], most: int) -> list[int]:
    """How many of the tokens that each sequence lacks go into the next step, which has room for `most`.

    One for each that lacks only one: those go on at every step, whatever is read beside them. What is left goes to
    the prompts, first come first; some may get nothing yet.
    """
    left = most - sum(count == 1 for count in lacking)
    given = []
    for count in lacking:
        if count == 1:
            given.append(1)
        else:
            given.append(max(0, min(count, left)))
            left -= given[-1]
    return given


class BatchSize:
    """How many sequences there should be: doubled as long as that gives more tokens a second, up to `most`.

    Only steps count in which every sequence had one token: one that reads prompts is wide by itself.
    """

    def __init__(self, now: int, most: int) -> None:
        assert 1 <= now <= most, f"{now} of at most {most} sequences"
        self.now, self._most = now, most
        self._before = 0  # the width that was measured last, and its tokens a second
        self._speed = 0.0
        self._seconds: list[float] = []

    def measured(self, sequences: int, seconds: float) -> None:
        """A step of one token for each of so many sequences took so long."""
        if sequences != self.now or self.now == self._most:
            return
        self._seconds.append(seconds)
        if len(self._seconds) < _SAMPLES:
            return
        speed, self._seconds = self.now / median(self._seconds), []
        if speed < _GAIN * self._speed:
            self.now = self._most = self._before
        else:
            self._before, self._speed = self.now, speed
            self.now = min(2 * self.now, self._most)

    def limit(self, most: int) -> None:
        """There is no room for more than this, at least one."""
        self._most = max(1, min(self._most, most))
        self.now = min(self.now, self._most)
