"""Anthropic's messages (https://docs.anthropic.com/en/api/messages): `/v1/messages` and its `count_tokens`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.serving.answer_parts import Delta
from fiddler.serving.http.answers import Answer, ChatJob, chat_job, collected
from fiddler.serving.http.anthropic_conversations import anthropic_conversation, anthropic_settings
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.errors import HttpError, error_object
from fiddler.serving.http.ids import random_id
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.http.sse import JsonAnswer, sse, unless_gone

__all__ = ["count_tokens", "messages"]

_BLOCKS = {"reasoning": "thinking", "content": "text", "call": "tool_use"}


async def messages(request: Request) -> Response:
    """POST /v1/messages."""
    service, body = service_of(request), await read_object(request, generates=True)
    job = await chat_job(service, anthropic_settings(body), anthropic_conversation(body))
    answering = _Answering(service, job)
    texts = service.open(job.job.requests, body)
    if texts.streamed:
        return service.stream(answering.events(texts), texts, _failure)
    try:
        answered = await unless_gone(request, answering.whole(texts))
    finally:
        texts.close()
    return JsonAnswer(answered)


async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens."""
    service, body = service_of(request), await read_object(request)
    prompt = await service.on_text(service.prompts.prompt, anthropic_conversation(body))
    return JsonAnswer({"input_tokens": len(prompt.ids)})


def _failure(error: HttpError) -> Sequence[bytes]:
    return [sse(error_object(error, anthropic=True), "error")]


class _Answering:
    """One request: its message in one piece, or as events."""

    def __init__(self, service: Service, job: ChatJob) -> None:
        self._job, self._answer = job, Answer(job)
        self._head = {"id": random_id("msg_"), "type": "message", "role": "assistant", "model": service.names[0]}
        self._open: str | None = None  # type of the block that is open
        self._block = -1  # its index

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The response of a request without `stream`."""
        await collected(texts, [self._answer])
        answer, blocks = self._answer, list[dict[str, Any]]()
        if answer.reasoning:
            blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.content or not answer.calls:
            blocks.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)})
        return {**self._head, "content": blocks, **self._end(), "usage": self._usage()}

    async def events(self, texts: Texts) -> AsyncIterator[bytes]:
        """The events of a request with `stream`."""
        begun = False
        async for delivery in texts:
            deltas = self._answer.see(delivery)
            if not begun:
                begun = True
                message: dict[str, Any] = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None}
                yield self._event("message_start", message={**message, "usage": self._usage()})
            for delta in deltas:
                for event in self._delta(delta):
                    yield event
        if self._block < 0:
            for event in self._delta(Delta("content", "")):
                yield event
        for event in self._closed():
            yield event
        yield self._event("message_delta", delta=self._end(), usage=self._usage())
        yield self._event("message_stop")

    def _delta(self, delta: Delta) -> list[bytes]:
        """The events of a delta, in a block of its own where the open one is of another kind."""
        events: list[bytes] = []
        kind = _BLOCKS.get(delta.kind, "tool_use")
        if delta.kind == "call" or kind != self._open:
            events += self._closed()
            self._open, self._block = kind, self._block + 1
            block: dict[str, Any] = {"type": kind}
            if kind == "tool_use":
                block |= {"id": delta.id, "name": delta.text, "input": {}}
            else:
                block |= {"thinking": "", "signature": ""} if kind == "thinking" else {"text": ""}
            events.append(self._event("content_block_start", index=self._block, content_block=block))
        if delta.kind == "call" or not delta.text:
            return events
        names = {"thinking": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}
        name, field = names.get(kind, ("input_json_delta", "partial_json"))
        part = {"type": name, field: delta.text}
        return [*events, self._event("content_block_delta", index=self._block, delta=part)]

    def _closed(self) -> list[bytes]:
        """The events that close the open block."""
        if self._open is None:
            return []
        events = []
        if self._open == "thinking":  # clients want one, and send it back; nothing here reads it
            signature = {"type": "signature_delta", "signature": ""}
            events.append(self._event("content_block_delta", index=self._block, delta=signature))
        self._open = None
        return [*events, self._event("content_block_stop", index=self._block)]

    def _event(self, name: str, **fields: Any) -> bytes:
        return sse({"type": name, **fields}, name)

    def _end(self) -> dict[str, Any]:
        completion = self._answer.progress.completion
        assert completion is not None
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        reason = reasons[self._answer.finish_reason]
        if completion.stop_string and reason == "end_turn":
            return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_string}
        return {"stop_reason": reason, "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        cached = self._answer.progress.cached
        return {
            "input_tokens": self._job.job.prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": len(self._answer.progress.tokens),
        }


def _input(arguments: str) -> Any:
    """The arguments of a call as an object; empty where they were cut off."""
    try:
        value = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
