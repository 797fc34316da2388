"""Parsers of tool calls in a model's own syntax, piece by piece. Pure; which syntax a model has: `tool_formats.py`.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Mistral: `[TOOL_CALLS]` and a list of such
objects, or a name, `[ARGS]` and the arguments. DeepSeek: a name and its arguments between markers of its own. A bare
object: the whole answer is one such object (Llama 3). Text that is no call after all stays content, marker included.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from fiddler.serving.answer_parts import Delta, Markers
from fiddler.serving.call_pieces import CallNumbers, NamedArguments, ObjectCall, named_call

__all__ = ["BareObjectParser", "DeepSeekParser", "HermesParser", "MistralParser"]


class HermesParser:
    """Calls between `<tool_call>` and `</tool_call>`."""

    _BEGIN, _FINISH = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._calls, self._held = CallNumbers(), ""
        self._call: ObjectCall | None = None
        self._begin, self._after = Markers([self._BEGIN]), False

    def push(self, text: str) -> list[Delta]:
        """Implements `ToolParser.push`."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            if self._call is not None:
                held, self._held = self._held, ""
                more, rest = self._call.push(held)
                deltas += more
                if rest is None:
                    return deltas
                if not self._call.begun:
                    deltas.append(Delta("content", self._BEGIN + self._call.text))
                self._after, self._call, self._held = self._call.begun, None, rest
            if self._after:
                self._held = self._held.lstrip()
                if self._FINISH.startswith(self._held) and self._held != self._FINISH:
                    return deltas
                self._held, self._after = self._held.removeprefix(self._FINISH), False
            at, marker = self._begin.find(self._held)
            certain = len(self._held[:at].rstrip()) if marker else self._begin.certain(self._held)
            if certain:
                deltas.append(Delta("content", self._held[:certain]))
            self._held = self._held[at + len(marker) :] if marker else self._held[certain:]
            if not marker:
                return deltas
            self._call = ObjectCall(self._calls)

    def finish(self) -> list[Delta]:
        """Implements `ToolParser.finish`."""
        held, self._held = self._held, ""
        if self._call is not None:
            return [] if self._call.begun else [Delta("content", self._BEGIN + self._call.text)]
        return [] if self._after or not held.strip() else [Delta("content", held)]


class BareObjectParser:
    """The whole answer is an object with the name of a known function, and its arguments."""

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""
        self._plain = False

    def push(self, text: str) -> list[Delta]:
        """Implements `ToolParser.push`. An answer that begins with a brace is held back until its end."""
        if self._plain:
            return [Delta("content", text)] if text else []
        self._held += text
        stripped = self._held.lstrip()
        if not stripped or stripped.startswith("{"):
            return []
        self._plain, held, self._held = True, self._held, ""
        return [Delta("content", held)]

    def finish(self) -> list[Delta]:
        """Implements `ToolParser.finish`."""
        held, self._held = self._held, ""
        found = named_call(held) if held.strip() else None
        if found is not None and found[0] in self._names:
            calls = CallNumbers()
            return [calls.begin(found[0]), *calls.arguments(found[1])]
        return [Delta("content", held)] if held.strip() else []


class DeepSeekParser:
    """DeepSeek's calls, of V3 and R1 (`function<sep>NAME`, arguments in a block of code) and of V3.1 (`NAME<sep>`)."""

    _ALL, _BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581begin\uff5c>"

    def __init__(self) -> None:
        self._calls, self._held, self._inside = CallNumbers(), "", False
        self._call: NamedArguments | None = None
        self._begin = Markers([self._ALL, self._BEGIN])

    def push(self, text: str) -> list[Delta]:
        """Implements `ToolParser.push`. Behind the first call there is no content."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            if self._call is not None:
                held, self._held = self._held, ""
                more, rest = self._call.push(held)
                deltas += more
                if rest is None:
                    return deltas
                self._call, self._held = None, rest
            at, marker = self._begin.find(self._held)
            certain = len(self._held[:at].rstrip()) if marker else self._begin.certain(self._held)
            if certain and not self._inside:
                deltas.append(Delta("content", self._held[:certain]))
            self._held = self._held[at + len(marker) :] if marker else self._held[certain:]
            if not marker:
                return deltas
            self._inside = True
            if marker == self._BEGIN:
                self._call = NamedArguments(self._calls)

    def finish(self) -> list[Delta]:
        """Implements `ToolParser.finish`."""
        held, self._held = self._held, ""
        if self._call is not None and not self._call.begun:
            return [Delta("content", self._BEGIN + self._call.text)]
        return [Delta("content", held)] if held.strip() and not self._inside else []


class MistralParser:
    """Mistral's calls, as a list of objects (`[TOOL_CALLS][{"name": ...}]`) or `[TOOL_CALLS]NAME[ARGS]{...}`."""

    _BEGIN = "[TOOL_CALLS]"

    def __init__(self) -> None:
        self._calls, self._held = CallNumbers(), ""
        self._call: ObjectCall | NamedArguments | None = None
        self._state: Literal["content", "begin", "list", "after"] = "content"
        self._begin = Markers([self._BEGIN])

    def push(self, text: str) -> list[Delta]:
        """Implements `ToolParser.push`."""
        self._held += text
        deltas: list[Delta] = []
        while True:
            if self._call is not None:
                held, self._held = self._held, ""
                more, rest = self._call.push(held)
                deltas += more
                if rest is None:
                    return deltas
                if not self._call.begun:
                    deltas.append(Delta("content", self._BEGIN + self._call.text))
                self._call, self._held = None, rest
            if self._state in ("begin", "list"):
                if not self._begin_call():
                    return deltas
                continue
            at, marker = self._begin.find(self._held)
            certain = len(self._held[:at].rstrip()) if marker else self._begin.certain(self._held)
            if certain and self._state == "content":
                deltas.append(Delta("content", self._held[:certain]))
            self._held = self._held[at + len(marker) :] if marker else self._held[certain:]
            if not marker:
                return deltas
            self._state = "begin"

    def finish(self) -> list[Delta]:
        """Implements `ToolParser.finish`."""
        held, self._held = self._held, ""
        if self._call is not None and not self._call.begun:
            return [Delta("content", self._BEGIN + self._call.text)]
        return [Delta("content", held)] if held.strip() and self._state == "content" else []

    def _begin_call(self) -> bool:
        """Begin the next call, or leave a list that has ended; False where more text must come first."""
        self._held = self._held.lstrip(" \t\r\n," if self._state == "list" else " \t\r\n")
        if not self._held:
            return False
        if self._state == "begin" and self._held.startswith("["):
            self._state, self._held = "list", self._held[1:]
        elif self._state == "list" and not self._held.startswith("{"):
            self._state = "after"
        elif self._held.startswith("{"):
            self._call = ObjectCall(self._calls)
            self._state = self._state if self._state == "list" else "after"
        else:
            self._call, self._state = NamedArguments(self._calls), "after"
        return True
