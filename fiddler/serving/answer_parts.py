"""The parts of an answer as its text comes: reasoning, content, calls of tools. Pure; knows no protocol.

An `AnswerParser` is fed pieces of text and returns deltas. It holds back only what may yet become a marker, and white
space around one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

__all__ = ["AnswerParser", "Delta", "Markers", "ReasoningParser", "ToolParser"]

THINK, THINK_END = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one part. kind "call": a new call of the function `text`, number `index`, with an `id`.

    kind "arguments": more of the JSON text of that call's arguments. Otherwise text that is never empty.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0
    id: str = ""


class ToolParser(Protocol):
    """Finds calls of tools in the content of an answer."""

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain with another piece of content."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back: no more comes."""
        ...


class Markers:
    """Looks for the first of several markers in text that comes in pieces."""

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = markers

    def find(self, text: str) -> tuple[int, str]:
        """Where the first marker begins, and which it is; the end of `text` and "" where there is none."""
        found = [(at, -len(marker), marker) for marker in self._markers if (at := text.find(marker)) >= 0]
        if not found:
            return len(text), ""
        at, _, marker = min(found)
        return at, marker

    def certain(self, text: str) -> int:
        """Length of the beginning of `text`, which has no marker, that can belong to none, trailing blanks left out."""
        longest = max(map(len, self._markers), default=0)
        for begin in range(max(0, len(text) - longest + 1), len(text)):
            if any(marker.startswith(text[begin:]) for marker in self._markers):
                return len(text[:begin].rstrip())
        return len(text.rstrip())


class ReasoningParser:
    """Splits reasoning between `<think>` and `</think>`, at the beginning of an answer, from the content after it."""

    def __init__(self, thinking: bool) -> None:
        """thinking: the prompt has opened the reasoning already."""
        self._state: Literal["begin", "thinking", "after", "content"] = "thinking" if thinking else "begin"
        self._held, self._end, self._started = "", Markers([THINK_END]), False

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain with another piece of text; of kind "reasoning" and "content"."""
        if self._state == "content":
            return [Delta("content", text)] if text else []
        self._held += text
        if self._state == "begin":
            return self._begin()
        return self._think() if self._state == "thinking" else self._content()

    def finish(self) -> list[Delta]:
        """What was held back: no more comes."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            return self._reasoning(held.rstrip() if self._started else held.strip())
        return [Delta("content", held)] if held and self._state == "begin" else []

    def _begin(self) -> list[Delta]:
        stripped = self._held.lstrip()
        if stripped.startswith(THINK):
            self._state, self._held = "thinking", stripped.removeprefix(THINK)
            return self._think()
        if THINK.startswith(stripped):
            return []
        self._state, held, self._held = "content", self._held, ""
        return [Delta("content", held)]

    def _think(self) -> list[Delta]:
        if not self._started:
            self._held = self._held.lstrip()
        at, marker = self._end.find(self._held)
        if not marker:
            certain = self._end.certain(self._held)
            text, self._held = self._held[:certain], self._held[certain:]
            return self._reasoning(text)
        text, self._held = self._held[:at].rstrip(), self._held[at + len(marker) :]
        self._state = "after"
        return self._reasoning(text) + self._content()

    def _reasoning(self, text: str) -> list[Delta]:
        self._started = self._started or bool(text)
        return [Delta("reasoning", text)] if text else []

    def _content(self) -> list[Delta]:
        held = self._held.lstrip()
        if not held:
            return []
        self._state, self._held = "content", ""
        return [Delta("content", held)]


class AnswerParser:
    """Splits an answer into its parts."""

    def __init__(self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None) -> None:
        """reasoning, tools: None leaves such parts in the content."""
        self._reasoning, self._tools = reasoning, tools
        self.calls = 0  # so far

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain with another piece of text."""
        parts = ([Delta("content", text)] if text else []) if self._reasoning is None else self._reasoning.push(text)
        return self._with_calls(parts)

    def finish(self) -> list[Delta]:
        """What was held back: no more comes."""
        deltas = [] if self._reasoning is None else self._with_calls(self._reasoning.finish())
        return deltas if self._tools is None else deltas + self._counted(self._tools.finish())

    def _with_calls(self, parts: Sequence[Delta]) -> list[Delta]:
        if self._tools is None:
            return list(parts)
        deltas: list[Delta] = []
        for part in parts:
            deltas += [part] if part.kind == "reasoning" else self._counted(self._tools.push(part.text))
        return deltas

    def _counted(self, deltas: list[Delta]) -> list[Delta]:
        self.calls += sum(delta.kind == "call" for delta in deltas)
        return deltas
