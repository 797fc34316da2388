"""The messages of an answer in harmony, gpt-oss's format, found as its text comes. Pure; knows no tokenizer.

After `<|start|>assistant` each message has a header, `<|message|>`, its text, and an end. The header names a channel
(`<|channel|>analysis`: reasoning; `commentary`; `final`) and may name a recipient, ` to=functions.NAME`, before or
behind the channel: then the text is the arguments of a call. `<|constrain|>json` tells their kind
(https://cookbook.openai.com/articles/openai-harmony). The tokens that end a generation, `<|return|>` and `<|call|>`,
are no part of its text. Text in any other form is content, marks included.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

__all__ = ["HARMONY_MARKS", "OPENS_FINAL", "HarmonyMessages", "HarmonyPart", "is_harmony"]

_CHANNEL, _MESSAGE, _CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
_START, _END, _CALL, _RETURN = "<|start|>", "<|end|>", "<|call|>", "<|return|>"
HARMONY_MARKS = (_CHANNEL, _MESSAGE, _CONSTRAIN, _START, _END)
"""Control tokens that an answer's text must show."""
OPENS_FINAL = f"{_CHANNEL}final{_MESSAGE}"
"""What stands before the content of an answer that is begun."""

_ENDS = (_START, _END, _CALL, _RETURN)
_FIELD = re.compile(rf"({re.escape(_CHANNEL)}|{re.escape(_CONSTRAIN)}|\bto=)")
_ROLE = re.compile(r"\s*[a-z]*\s*")
_BEGINS = (_CHANNEL, _CONSTRAIN, _MESSAGE, "to=")
_LONGEST_HEADER = 1024  # [characters]
_FUNCTIONS = "functions."

_Kind = Literal["reasoning", "content", "call", "arguments"]


class HarmonyPart(NamedTuple):
    """More of one part, or, of kind "call", a new call of the function `text`. `new`: the first of its message."""

    kind: _Kind
    text: str
    new: bool = False


def is_harmony(template: str | None) -> bool:
    """Whether a chat template writes this format."""
    return template is not None and all(mark in template for mark in (_START, _CHANNEL, _MESSAGE))


class HarmonyMessages:
    """Splits an answer into its messages. Holds back only what may yet become a mark, and headers."""

    def __init__(self, *, begun: bool = False) -> None:
        """begun: the prompt holds the header of a final message already."""
        self._held = ""
        self._state: Literal["header", "text", "between"] = "text" if begun else "header"
        self._kind: _Kind = "content"
        self._role, self._new = False, not begun  # whether the header has the role; whether its text has not begun

    def push(self, text: str) -> list[HarmonyPart]:
        """The parts that are certain with another piece of text; none is empty."""
        self._held += text
        parts: list[HarmonyPart] = []
        while self._advance(parts):
            continue
        return parts

    def finish(self) -> list[HarmonyPart]:
        """What was held back: no more comes."""
        held, self._held = self._held, ""
        if self._state == "header" and (self._role or _CHANNEL in held or not held.strip()):
            return []  # a header without a text says nothing
        if self._state == "between" and not held.strip():
            return []
        return self._parts(held, self._kind if self._state == "text" else "content")

    def _advance(self, parts: list[HarmonyPart]) -> bool:
        """Take one step; False where more text must come first."""
        if self._state == "text":
            return self._read_text(parts)
        if self._state == "between":
            stripped = self._held.lstrip()
            if _START.startswith(stripped) and stripped != _START:
                return False
            self._new, self._kind = True, "content"
            self._role = stripped.startswith(_START)
            self._state, self._held = ("header", stripped[len(_START) :]) if self._role else ("text", self._held)
            return True
        return self._read_header(parts)

    def _read_header(self, parts: list[HarmonyPart]) -> bool:
        header, found, rest = self._held.partition(_MESSAGE)
        fields = _fields(header, role=self._role) if len(header) <= _LONGEST_HEADER else None
        if fields is None:
            self._state, self._kind, self._new = "text", "content", True
            return True
        if not found:
            return False
        self._held, self._state, self._new = rest, "text", True
        channel, recipient = fields
        self._kind = "reasoning" if channel == "analysis" else "content"
        if recipient:
            self._kind, self._new = "arguments", False
            parts.append(HarmonyPart("call", recipient, new=True))
        return True

    def _read_text(self, parts: list[HarmonyPart]) -> bool:
        ends = [(at, mark) for mark in _ENDS if (at := self._held.find(mark)) >= 0]
        if not ends:
            certain = _certain(self._held)
            parts += self._parts(self._held[:certain], self._kind)
            self._held = self._held[certain:]
            return False
        at, mark = min(ends)
        parts += self._parts(self._held[:at], self._kind)
        self._held = self._held[at + (0 if mark == _START else len(mark)) :]
        self._state = "between"
        return True

    def _parts(self, text: str, kind: _Kind) -> list[HarmonyPart]:
        if not text:
            return []
        new, self._new = self._new, False
        return [HarmonyPart(kind, text, new)]


def _fields(header: str, *, role: bool) -> tuple[str, str] | None:
    """Channel and function of a header, or of its beginning; None where it can be none. role: it begins with one."""
    rest = _ROLE.sub("", header, count=1) if role else header.lstrip()
    if rest and not any(rest.startswith(begin) or begin.startswith(rest) for begin in _BEGINS):
        return None
    channel = recipient = ""
    pieces = _FIELD.split(rest)
    for mark, value in zip(pieces[1::2], pieces[2::2], strict=True):
        words = value.split()
        if mark == _CHANNEL and words:
            channel = words[0]
        elif mark == "to=" and words:
            recipient = words[0]
    return channel, recipient.removeprefix(_FUNCTIONS)


def _certain(text: str) -> int:
    """Length of the beginning of `text` that can belong to no mark."""
    for begin in range(max(0, len(text) - max(map(len, _ENDS)) + 1), len(text)):
        if any(mark.startswith(text[begin:]) for mark in _ENDS):
            return begin
    return len(text)
