"""Batching delay: how long an idle server waits for requests that arrive together, to share their first step. Pure.

Where experts are missing, one prompt by itself takes nearly as long as sixteen together: a step reads each expert once.
"""

from __future__ import annotations

__all__ = ["StepTimes", "batching_delay"]

_SHARE, _LEAST, _MOST = 0.1, 5e-3, 50e-3  # of the expected step; seconds
_QUIET_SHARE, _QUIET_MOST = 0.01, 5e-3


class StepTimes:
    """The seconds that a step will take at least, from those of earlier steps that read prompts."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, float]] = {}  # by the magnitude of the tokens: tokens and seconds of the last

    def took(self, tokens: int, seconds: float) -> None:
        """Take in a step that read `tokens` of prompts. It corrects others that took longer than it allows.

        The first step of a start does: it reads weights from disk, or compiles.
        """
        for magnitude, (known, longer) in self._known.items():
            self._known[magnitude] = known, min(longer, seconds * max(1.0, known / tokens))
        self._known[tokens.bit_length()] = tokens, seconds

    def __call__(self, tokens: int) -> float | None:
        """Seconds of a step of so many tokens; None before the first step.

        More tokens take no less time than fewer do, and no more than in proportion.
        """
        return max((seconds * min(1.0, tokens / known) for known, seconds in self._known.values()), default=None)


def batching_delay(expected: float | None, waited: float, quiet: float, *, arriving: bool) -> float:
    """Seconds to wait for more requests before the first step of some; 0 or less: begin.

    expected: seconds of their first step, None: unknown. waited: seconds since the first of them; quiet: since the last
    one. arriving: whether others have arrived that are still being read and encoded: they are waited for up to a tenth
    of the step, 5 to 50 ms. Others may be on their way: silence of a hundredth of the step, at most 5 ms, says no.
    """
    limit = _MOST if expected is None else min(max(_SHARE * expected, _LEAST), _MOST)
    if arriving:
        return limit - waited
    pause = _QUIET_MOST if expected is None else min(_QUIET_SHARE * expected, _QUIET_MOST)
    return min(limit - waited, pause - quiet)
