"""Whether copying blocks back takes less time than computing their positions again. Knows seconds; no blocks, no model.

Both sides are measured. What slows this machine down for a while slows both, so the fastest of each counts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from fiddler.cost_curve import Curve

__all__ = ["ResumeCosts"]


class ResumeCosts:
    """Seconds of copies, by their bytes, and of steps, by their tokens. Before a first measurement, copying pays."""

    def __init__(self, chunk: int, curve: Callable[[], Curve] | None) -> None:
        """chunk: the most tokens of a step. curve: seconds of a step by its tokens, called at the first question.

        Where the curve is None, the steps that `stepped` reports take its place.
        """
        self._chunk, self._measure = chunk, curve
        self._curve: Curve | None = None
        self._copy = 0.0  # [s/byte]
        self._token = inf  # [s]
        self._tokens, self._seconds = 0, 0.0  # of steps that a GPU may not have finished

    def copied(self, nbytes: int, seconds: float) -> None:
        """Note a copy between the GPU and the host, in either direction."""
        if nbytes and seconds > 0:
            self._copy = min(self._copy or inf, seconds / nbytes)

    def stepped(self, tokens: int, seconds: float, *, ended: bool) -> None:
        """Note a step. ended: whether its caller waited for the result, else the next one counts together with it."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        if ended:
            if self._tokens > 1 and self._seconds > 0:
                self._token = min(self._token, self._seconds / self._tokens)
            self._tokens, self._seconds = 0, 0.0

    def copy_pays(self, nbytes: int, positions: int) -> bool:
        """Whether a copy of so many bytes takes less time than computing so many positions again."""
        return nbytes * self._copy < self.recompute(positions)

    def recompute(self, positions: int) -> float:
        """Seconds by which the step that a sequence needs in any case takes longer with so many positions more."""
        if self._measure is None:
            return positions * self._token if positions else 0.0
        if self._curve is None:
            self._curve = self._measure()
        return self._steps(self._curve, positions + 1) - self._curve(1)

    def _steps(self, curve: Curve, tokens: int) -> float:
        """Seconds of so many tokens, step by step."""
        whole, rest = divmod(tokens, self._chunk)
        return whole * curve(self._chunk) + (curve(rest) if rest else 0.0)
