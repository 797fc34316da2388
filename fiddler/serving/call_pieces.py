"""Calls of tools as JSON that comes in pieces: one object, or a name and then the arguments. Pure."""

from __future__ import annotations

import json
import re
import secrets
import string
from typing import Literal

from fiddler.serving.answer_parts import Delta

__all__ = ["SEPARATOR", "CallNumbers", "NamedArguments", "ObjectCall", "named_call"]

SEPARATOR = "<\uff5ctool\u2581sep\uff5c>"
"""DeepSeek's, between kind and name, or name and arguments."""

# {"name": "f", "arguments": {   with an id before the name, as some models write
_HEAD = re.compile(
    r'\s*\{\s*(?:"id"\s*:\s*"[^"\\]*"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_LETTERS = string.ascii_letters + string.digits
_LONGEST_NAME = 256  # [characters]
_LONGEST_HEAD = 1024  # of an object before its arguments [characters]: it is searched again with every piece


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


class CallNumbers:
    """Numbers and names calls."""

    def __init__(self) -> None:
        self.count = 0

    def begin(self, name: str) -> Delta:
        self.count += 1
        identity = "".join(secrets.choice(_LETTERS) for _ in range(9))  # nine: the only form that Mistral's take
        return Delta("call", name, self.count - 1, identity)

    def arguments(self, text: str) -> list[Delta]:
        return [Delta("arguments", text, self.count - 1)] if text else []


class ObjectCall:
    """One object with a name and arguments, streamed as soon as both have begun."""

    def __init__(self, calls: CallNumbers) -> None:
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
            match = _HEAD.match(self._text[:_LONGEST_HEAD])
            if match is None:
                end = self._end.feed(text)
                rest = self._text.lstrip()
                if rest[:1] not in ("", "{"):  # no object, so no call
                    self._text = self._text.removesuffix(rest)
                    return [], rest
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
        found = named_call(self._text)
        if found is None:
            return []
        self._state = "tail"
        return [self._calls.begin(found[0]), *self._calls.arguments(found[1])]


def named_call(text: str) -> tuple[str, str] | None:
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


class NamedArguments:
    """A name, then the first JSON object after it: the common part of Mistral's new syntax and DeepSeek's."""

    def __init__(self, calls: CallNumbers) -> None:
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
    kind, separator, name = head.partition(SEPARATOR)
    if separator and kind.strip() == "function":
        head = name
    elif separator:
        head = kind
    return head.partition("[CALL_ID]")[0].removesuffix("```json").strip()[:_LONGEST_NAME]
