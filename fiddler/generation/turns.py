"""Whose turn a step is: that of all requests, or of the interactive ones alone. Pure: knows seconds and no requests.

Someone waits for each token of an interactive request; nobody waits for a batch's. A prompt of the former is read
alone, so that its first token comes soon, as QLLM puts latency-sensitive requests first. While it decodes, steps
without the batch are shorter, as fewer experts are read: both get half of the time.
"""

from __future__ import annotations

__all__ = ["Turns"]

_PATIENCE = 16  # steps in a row that a batch waits at most
_SHORTER = 0.7  # of a step of all: a step of the interactive requests alone saves nothing worth where it takes more


class Turns:
    """Divides steps between interactive requests and a batch beside them."""

    def __init__(self) -> None:
        self._waited = 0  # steps since the last one of all
        self._alone = 0.0  # their seconds
        self._all = 0.0  # of the last step of all
        self._last_alone = 0.0

    def alone(self, *, reading: bool) -> bool:
        """Whether the next step is without the batch. reading: whether an interactive prompt is being read."""
        if self._waited >= _PATIENCE:
            return False
        return reading or (self._alone < self._all and self._last_alone < _SHORTER * self._all)

    def took(self, seconds: float, *, alone: bool, reading: bool) -> None:
        """Note the seconds of a step in which interactive requests ran, with the batch or alone."""
        if not alone:
            self._waited, self._alone, self._all = 0, 0.0, seconds
            return
        self._waited += 1
        self._alone += seconds
        if not reading:
            self._last_alone = seconds
