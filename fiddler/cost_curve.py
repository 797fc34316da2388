"""`Curve`: seconds by number of tokens, and which number is worth its time. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

__all__ = ["Curve"]


@dataclass(frozen=True)
class Curve:
    """Seconds by number of tokens: straight lines between points, the last one extended."""

    tokens: tuple[int, ...]  # ascending, the first is 1
    seconds: tuple[float, ...]
    _known: dict[int, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.seconds) >= 1
        assert list(self.tokens) == sorted(set(self.tokens))

    def __call__(self, count: int) -> float:
        """Seconds for `count` tokens."""
        seconds = self._known.get(count)
        if seconds is None:
            seconds = self._known[count] = self._between(count)
        return seconds

    def _between(self, count: int) -> float:
        if len(self.tokens) == 1 or count <= self.tokens[0]:
            return self.seconds[0]
        right = min(bisect_left(self.tokens, count), len(self.tokens) - 1)
        (t0, t1), (s0, s1) = self.tokens[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return s0 + (s1 - s0) * (count - t0) / (t1 - t0)

    def efficient(self, maximum: int, share: float = 0.95) -> int:
        """The fewest tokens, at most `maximum`, at which so large a share of the best tokens a second is reached."""
        counts = [count for count in self.tokens if count < maximum] + [maximum]
        best = share * max(count / self(count) for count in counts) * (1 - 1e-9)  # whatever is rounded
        return next(count for count in range(1, maximum + 1) if count >= best * self(count))
