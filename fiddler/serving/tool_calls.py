"""Parsers of tool calls in a model's own syntax, piece by piece. Pure; which syntax a model has: `tool_formats.py`.

Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Mistral: `[TOOL_CALLS]` and a list of such
objects, or a name, `[ARGS]` and the arguments. DeepSeek: a name and its arguments between markers of its own. A bare
object: the whole answer is one such object (Llama 3). Text that is no call after all stays content, marker included.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection
from typing import Literal

from fiddler.serving.answer_parts import Delta, Markers

__all__ = ["BareObjectParser", "DeepSeekParser", "HermesParser", "MistralParser"]

# {"name": "f", "arguments": {   with an id before the name, as some models write
_HEAD = re.compile(
    r'\s*\{\s*(?:"id"\s*:\s*"[^"\\]*"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LETTERS = string.ascii_letters + string.digits
_LONGEST_NAME = 256  # [characters]


class _JsonEnd:
    """Finds the end of one JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self.depth = 0
        self._in_string = self._escaped = False

    def feed(self, text: str, until: int = 0) -> int | None:
        """How much of `text` belongs to the object, if its depth falls to `until` in it; None if it goes on."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self.depth += 1
            elif character in "}]":
                self.depth -= 1
                if self.depth <= until:
                    return at + 1
        return None


class _Calls:
    """Numbers and names calls."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, name: str) -> Delta:
        self.count += 1
        identity = "".join(secrets.choice(_LETTERS) for _ in range(9))  # nine: the only form that Mistral's take
        return Delta("call", name, self.count - 1, identity)

    def arguments(self, text: str) -> list[Delta]:
        return [Delta("arguments", text, self.count - 1)] if text else []


class _ObjectCall:
    """One object with a name and arguments, streamed as soon as both have begun."""

    def __init__(self, calls: _Calls) -> None:
        self._calls, self._text, self._end = calls, "", _JsonEnd()
        self._state: Literal["head", "arguments", "tail"] = "head"

    @property
    def text(self) -> str:
        """All of it so far."""
        return self._text

    def push(self, text: str) -> tuple[list[Delta], str | None]:
        """Deltas, and what follows the object once it is complete; None where it is not. See `failed`."""
        deltas: list[Delta] = []
        if self._state == "head":
            begin = len(self._text)
            self._text += text
            match = _HEAD.match(self._text)
            if match is None:
                end = self._end.feed(text)
                if self._text.lstrip()[:1] not in ("", "{"):
                    return [], ""  # no object, so no call
                if end is None:
                    return [], None
                rest, self._text = text[end:], self._text[: begin + end]
                return self._whole(), rest
            deltas.append(self._calls.begin(json.loads(match[1], strict=False)))
            self._state, self._end = "arguments", _JsonEnd()
            self._end.depth = 1
            text = self._text[match.end() :]
        if self._state == "arguments":
            end = self._end.feed(text, 1)
            deltas += self._calls.arguments(text if end is None else text[:end])
            if end is None:
                return deltas, None
            self._state, text = "tail", text[end:]
        end = self._end.feed(text)
        return deltas, None if end is None else text[end:]

    @property
    def begun(self) -> bool:
        """Whether a call was found."""
        return self._state != "head"

    def _whole(self) -> list[Delta]:
        """The deltas of a complete object whose keys come in another order; none where it is no call."""
        found = _named_call(self._text)
        if found is None:
            return []
        self._state = "tail"
        return [self._calls.begin(found[0]), *self._calls.arguments(found[1])]


def _named_call(text: str) -> tuple[str, str] | None:
    """Name and arguments, as JSON text, of an object; None where it is no call."""
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        return value["name"], arguments
    return value["name"], json.dumps(arguments, ensure_ascii=False)


class HermesParser:
    """Calls between `<tool_call>` and `</tool_call>`."""

    _BEGIN, _FINISH = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        self._calls, self._held = _Calls(), ""
        self._call: _ObjectCall | None = None
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
                self._call, self._held, self._after = None, rest, self._call.begun
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
            self._call = _ObjectCall(self._calls)

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
        found = _named_call(held) if held.strip() else None
        if found is not None and found[0] in self._names:
            calls = _Calls()
            return [calls.begin(found[0]), *calls.arguments(found[1])]
        return [Delta("content", held)] if held.strip() else []


class _NamedArguments:
    """A name, then the first JSON object after it: the common part of Mistral's new syntax and DeepSeek's."""

    def __init__(self, calls: _Calls) -> None:
        self._calls, self.text, self._name = calls, "", ""
        self._end: _JsonEnd | None = None

    @property
    def begun(self) -> bool:
        """Whether a call was found."""
        return self._end is not None

    def push(self, text: str) -> tuple[list[Delta], str | None]:
        """Deltas, and what follows the object once it is complete; None where it is not."""
        deltas: list[Delta] = []
        if self._end is None:
            self.text += text
            head, brace, rest = self.text.partition("{")
            if not brace:
                return [], None
            self._end, name = _JsonEnd(), _function_name(head)
            deltas.append(self._calls.begin(name))
            text = brace + rest
        end = self._end.feed(text)
        deltas += self._calls.arguments(text if end is None else text[:end])
        return deltas, None if end is None else text[end:]


def _function_name(head: str) -> str:
    """The name in what stands before the arguments: `NAME`, `NAME[ARGS]`, `NAME<sep>`, `function<sep>NAME\n```json`."""
    head = head.removesuffix("```json\n").removesuffix("[ARGS]").strip()
    kind, separator, name = head.partition(DeepSeekParser.SEPARATOR)
    if separator and kind.strip() == "function":
        head = name
    elif separator:
        head = kind
    return head.partition("[CALL_ID]")[0].removesuffix("```json").strip()[:_LONGEST_NAME]


class DeepSeekParser:
    """DeepSeek's calls, of V3 and R1 (`function<sep>NAME`, arguments in a block of code) and of V3.1 (`NAME<sep>`)."""

    _ALL, _BEGIN = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581begin\uff5c>"
    SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"

    def __init__(self) -> None:
        self._calls, self._held, self._inside = _Calls(), "", False
        self._call: _NamedArguments | None = None
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
                self._call = _NamedArguments(self._calls)

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
        self._calls, self._held = _Calls(), ""
        self._call: _ObjectCall | _NamedArguments | None = None
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
            self._call = _ObjectCall(self._calls)
            self._state = self._state if self._state == "list" else "after"
        else:
            self._call, self._state = _NamedArguments(self._calls), "after"
        return True
