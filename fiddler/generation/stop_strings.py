"""Stop strings in a stream of text: holds back text that may become one, lets the rest through.

Knows text only. The stop string that is complete first decides, however the text was cut into pieces: of several
that end at the same character, the longest. The search is Knuth's, Morris's and Pratt's: linear in the text, whatever
the stop strings are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Match", "StopStrings", "StopText"]


class Match(NamedTuple):
    """Where a stop string lies, in characters from the begin of the last piece: `begin` is negative before it."""

    begin: int
    end: int


class StopStrings:
    """Searches several strings at once. A state is the number of characters of each that the text so far ends with."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string has at least one character"
        self._patterns = [_Pattern(stop) for stop in stops]
        self.start = (0,) * len(self._patterns)

    def advance(self, matched: tuple[int, ...], text: str) -> tuple[tuple[int, ...], Match | None]:
        """The state after another piece of text, and the first stop string, if one is complete."""
        states, matches = [], []
        for pattern, state in zip(self._patterns, matched, strict=True):
            state, end = pattern.advance(state, text)
            states.append(state)
            if end is not None:
                matches.append((end, end - state))
        if not matches:
            return tuple(states), None
        end, begin = min(matches)
        return tuple(states), Match(begin, end)


class StopText:
    """Feed pieces of text; the output never holds a stop string nor anything after it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = StopStrings(stops)
        self._matched = self._stops.start
        self._held, self._held_length = deque[str](), 0
        self.found = False
        self.string = ""  # the stop string that was found

    def push(self, text: str) -> str:
        """The text that is certain by now: before the first stop string, and not the beginning of one."""
        if self.found:
            return ""
        if not self._matched:
            return text
        self._matched, match = self._stops.advance(self._matched, text)
        if match is not None:
            self.found = True
            certain = self._release(self._held_length + min(match.begin, 0)) + text[: max(match.begin, 0)]
            self.string = "".join(self._held) * (match.begin < 0) + text[max(match.begin, 0) : match.end]
            self._held, self._held_length = deque(), 0
            return certain
        self._held.append(text)
        self._held_length += len(text)
        return self._release(self._held_length - max(self._matched))

    def finish(self) -> str:
        """The text that was held back: no more comes."""
        return self._release(self._held_length)

    def _release(self, length: int) -> str:
        """The first characters of the held text."""
        parts, self._held_length = [], self._held_length - length
        while length > 0:
            part = self._held.popleft()
            if len(part) > length:
                self._held.appendleft(part[length:])
            parts.append(part[:length])
            length -= len(part)
        return "".join(parts)


class _Pattern:
    """One string, and its borders as far as a text needed them."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._borders = [0]  # [n - 1]: the longest proper prefix of the first n characters that also ends them

    def advance(self, matched: int, text: str) -> tuple[int, int | None]:
        """The state after `text`; with the first complete occurrence, if any, the state there, and where it ends."""
        pattern, at = self._text, 0
        while at < len(text):
            if not matched:  # find is faster than a loop
                at = text.find(pattern[0], at)
                if at < 0:
                    return 0, None
            while matched and pattern[matched] != text[at]:
                matched = self._border(matched)
            if pattern[matched] == text[at]:
                matched += 1
            at += 1
            if matched == len(pattern):
                return matched, at
        return matched, None

    def _border(self, length: int) -> int:
        borders, pattern = self._borders, self._text
        while len(borders) < length:
            border, letter = borders[-1], pattern[len(borders)]
            while border and pattern[border] != letter:
                border = borders[border - 1]
            borders.append(border + (pattern[border] == letter))
        return borders[length - 1]
