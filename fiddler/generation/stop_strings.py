"""Stop strings in a stream of text: holds back text that may become one, lets the rest through.

Knows text only. The stop string that is complete first decides, however the text was cut into pieces: of several
that end at the same character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopText"]


class StopText:
    """Feed pieces of text; the output never holds a stop string nor anything after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string has at least one character"
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain by now: before the first stop string, and not the beginning of one."""
        if self.found:
            return ""
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            self.found = True
            _, begin = min(matches)
            certain, self._held = self._held[:begin], ""
            return certain
        overlap = max((self._overlap(stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - overlap]
        self._held = self._held[len(self._held) - overlap :]
        return certain

    def finish(self) -> str:
        """The text that was held back: no more comes."""
        rest, self._held = self._held, ""
        return rest

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text that begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
