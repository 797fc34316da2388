"""Output items of OpenAI's responses: reasoning, a message, calls of functions; and the events that tell them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fiddler.serving.answer_parts import Delta
from fiddler.serving.http.answers import Answer
from fiddler.serving.http.ids import random_id

__all__ = ["Items"]

Event = tuple[str, dict[str, Any]]
_KINDS = {"reasoning": "reasoning", "content": "message"}


class Items:
    """The items so far; the last one may be open. `done`: those that are complete."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []
        self._item: dict[str, Any] | None = None
        self._text = ""

    @classmethod
    def of(cls, answer: Answer) -> list[dict[str, Any]]:
        """All items of an answer that has ended."""
        items = cls()
        parts = [Delta("reasoning", answer.reasoning)] if answer.reasoning else []
        parts += [Delta("content", answer.content)] if answer.content or not (parts or answer.calls) else []
        for index, call in enumerate(answer.calls):
            parts += [Delta("call", call.name, index, call.id), Delta("arguments", call.arguments, index)]
        for part in parts:
            list(items.push(part))
        list(items.finish())
        return items.done

    def push(self, delta: Delta) -> Iterator[Event]:
        """The events of a delta, in an item of its own where the open one is of another kind."""
        kind = _KINDS.get(delta.kind, "function_call")
        if delta.kind == "call" or self._item is None or self._item["type"] != kind:
            yield from self._closed()
            yield from self._opened(kind, delta)
        if delta.kind == "call":
            return
        self._text += delta.text
        names = {"reasoning": "reasoning_text", "message": "output_text", "function_call": "function_call_arguments"}
        yield f"response.{names[kind]}.delta", {**self._where(), "delta": delta.text}

    def finish(self) -> Iterator[Event]:
        """The events at the end; an answer without any text has an empty message."""
        if self._item is None and not self.done:
            yield from self._opened("message", Delta("content", ""))
        yield from self._closed()

    def _opened(self, kind: str, delta: Delta) -> Iterator[Event]:
        self._text = ""
        if kind == "reasoning":
            self._item = {"id": random_id("rs_"), "summary": [], "content": [], "encrypted_content": ""}
        elif kind == "message":
            self._item = {"id": random_id("msg_"), "role": "assistant", "content": []}
        else:
            self._item = {"id": f"fc_{delta.id}", "call_id": delta.id, "name": delta.text, "arguments": ""}
        self._item |= {"type": kind, "status": "in_progress"}
        yield "response.output_item.added", {"output_index": len(self.done), "item": dict(self._item)}
        if kind == "message":
            yield "response.content_part.added", {**self._where(), "part": _part("")}

    def _closed(self) -> Iterator[Event]:
        item, where = self._item, self._where()
        if item is None:
            return
        if item["type"] == "reasoning":
            yield "response.reasoning_text.done", {**where, "text": self._text}
            item["content"] = [{"type": "reasoning_text", "text": self._text}]
        elif item["type"] == "message":
            yield "response.output_text.done", {**where, "text": self._text}
            yield "response.content_part.done", {**where, "part": _part(self._text)}
            item["content"] = [_part(self._text)]
        else:
            yield "response.function_call_arguments.done", {**where, "arguments": self._text, "name": item["name"]}
            item["arguments"] = self._text
        item["status"] = "completed"
        index, self._item = len(self.done), None
        self.done.append(item)
        yield "response.output_item.done", {"output_index": index, "item": item}

    def _where(self) -> dict[str, Any]:
        if self._item is None:
            return {}
        where = {"item_id": self._item["id"], "output_index": len(self.done)}
        if self._item["type"] == "function_call":
            return where
        more: dict[str, Any] = {"logprobs": []} if self._item["type"] == "message" else {}
        return {**where, "content_index": 0, **more}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
