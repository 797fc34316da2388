"""Answers in harmony, gpt-oss's format, as deltas: reasoning, content and calls of tools. Pure."""

from __future__ import annotations

from fiddler.serving.answer_parts import Delta
from fiddler.serving.call_pieces import CallNumbers
from fiddler.text.harmony import HarmonyMessages, HarmonyPart

__all__ = ["HarmonyParser"]

_BETWEEN = "\n\n"  # between messages of one kind, which the answer has in one text


class HarmonyParser:
    """Splits an answer into its parts, as `AnswerParser` does."""

    def __init__(self, *, begun: bool, split_reasoning: bool, tools: bool) -> None:
        """begun: the prompt has the beginning of the final message. split_reasoning, tools: else these are content."""
        self._messages, self._numbers = HarmonyMessages(begun=begun), CallNumbers()
        self._split_reasoning, self._tools = split_reasoning, tools
        self._seen: set[str] = set()  # kinds of text so far

    @property
    def calls(self) -> int:
        """Calls of tools so far."""
        return self._numbers.count

    def push(self, text: str) -> list[Delta]:
        """The deltas that are certain with another piece of text."""
        return self._deltas(self._messages.push(text))

    def finish(self) -> list[Delta]:
        """What was held back: no more comes."""
        return self._deltas(self._messages.finish())

    def _deltas(self, parts: list[HarmonyPart]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            if part.kind == "call":
                deltas += [self._numbers.begin(part.text)] if self._tools else self._text("content", part)
            elif part.kind == "arguments":
                deltas += self._numbers.arguments(part.text) if self._tools else self._text("content", part)
            else:
                deltas += self._text(part.kind if self._split_reasoning else "content", part)
        return deltas

    def _text(self, kind: str, part: HarmonyPart) -> list[Delta]:
        between = _BETWEEN if part.new and kind in self._seen else ""
        self._seen.add(kind)
        return [Delta("reasoning" if kind == "reasoning" else "content", between + part.text)]
