"""An answer in harmony as one reads it, and as a message of the conversation. Pure."""

from __future__ import annotations

import json

from fiddler.text.harmony import HARMONY_MARKS, HarmonyMessages, HarmonyPart
from fiddler.text.messages import Message
from fiddler.text.tokenizer import Tokenizer

__all__ = ["HarmonyTurn", "named_marks"]

_OPEN, _CLOSE, _BETWEEN = "<think>\n", "\n</think>\n\n", "\n\n"  # as other models write reasoning themselves


def named_marks(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids of the format's marks that are control tokens, which a text shows only by request."""
    ids = {name: tokenizer.encode(name, parse_special=True) for name in HARMONY_MARKS}
    return frozenset(each[0] for each in ids.values() if len(each) == 1 and not tokenizer.decode(each))


class HarmonyTurn:
    """Reasoning stands between `<think>` and `</think>`, a call as NAME(ARGUMENTS)."""

    def __init__(self) -> None:
        self._messages = HarmonyMessages()
        self._kind = ""  # of the last part shown
        self._texts = {"reasoning": "", "content": ""}
        self._calls: list[list[str]] = []  # name and arguments of each

    def push(self, text: str) -> str:
        """What another piece of the answer shows."""
        return self._shown(self._messages.push(text))

    def finish(self) -> str:
        """What was held back: no more comes."""
        return self._shown(self._messages.finish()) + self._closed("end")

    @property
    def message(self) -> Message:
        """The assistant's message: content or `tool_calls`, and `thinking`; templates take no content beside calls."""
        thinking, content = self._texts["reasoning"], self._texts["content"]
        if not self._calls:
            return {"role": "assistant", "content": content} | ({"thinking": thinking} if thinking else {})
        calls = [{"type": "function", "function": {"name": n, "arguments": _decoded(a)}} for n, a in self._calls]
        thinking = _BETWEEN.join(each for each in (thinking, content) if each)
        return {"role": "assistant", "tool_calls": calls} | ({"thinking": thinking} if thinking else {})

    def _shown(self, parts: list[HarmonyPart]) -> str:
        shown = ""
        for part in parts:
            if part.kind in self._texts:
                between = _BETWEEN if part.new and self._texts[part.kind] else ""
                self._texts[part.kind] += between + part.text
            elif part.kind == "call":
                self._calls.append([part.text, ""])
            else:
                self._calls[-1][1] += part.text
            shown += self._opened(part) + part.text + ("(" if part.kind == "call" else "")
        return shown

    def _opened(self, part: HarmonyPart) -> str:
        """What stands before a part."""
        if part.kind == "arguments" or not (part.new or part.kind != self._kind):
            return ""
        first, closed = not self._kind, self._closed(part.kind)
        self._kind = part.kind
        if part.kind == "reasoning":
            return closed + (_OPEN if closed or first else _BETWEEN)
        return closed or ("" if first else _BETWEEN)

    def _closed(self, following: str) -> str:
        """What stands behind the last part, before one of another kind."""
        if self._kind == "call":
            return ")" + ("" if following == "end" else _BETWEEN)
        return _CLOSE if self._kind == "reasoning" and following not in ("reasoning", "end") else ""


def _decoded(arguments: str) -> object:
    """The arguments as an object, where their JSON is one; else their text."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
