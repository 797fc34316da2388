"""OpenAI's responses (https://platform.openai.com/docs/api-reference/responses), without a store of past ones."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.generation.events import Joined, PromptRead
from fiddler.serving.http.answers import Answer, ChatJob, chat_job, collected
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.errors import HttpError, error_object
from fiddler.serving.http.ids import random_id
from fiddler.serving.http.response_items import Items
from fiddler.serving.http.responses_input import responses_conversation, responses_settings
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.http.sse import JsonAnswer, sse, unless_gone
from fiddler.serving.request_fields import flag

__all__ = ["responses", "responses_tokens"]


async def responses(request: Request) -> Response:
    """POST /v1/responses."""
    service, body = service_of(request), await read_object(request, generates=True)
    job = await chat_job(service, responses_settings(body), responses_conversation(body))
    answering = _Answering(service, job, body)
    texts = service.open(job.job.requests, body)
    if texts.streamed:
        return service.stream(answering.events(texts), texts, answering.failure)
    try:
        answered = await unless_gone(request, answering.whole(texts))
    finally:
        texts.close()
    return JsonAnswer(answered)


async def responses_tokens(request: Request) -> Response:
    """POST /v1/responses/input_tokens."""
    service, body = service_of(request), await read_object(request)
    prompt = await service.on_text(service.prompts.prompt, responses_conversation(body))
    return JsonAnswer({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})


class _Answering:
    """One request: its response in one piece, or as events, which are numbered."""

    def __init__(self, service: Service, job: ChatJob, body: Mapping[str, Any]) -> None:
        self._job, self._answer, self._items = job, Answer(job), Items()
        self._number = 0
        self._timings, self._progress = flag(body, "timings_per_token"), flag(body, "return_progress")
        sampling = job.job.settings.sampling
        self._head = {
            "id": random_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "model": service.names[0],
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": job.job.settings.max_tokens,
            "metadata": body.get("metadata") or {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
        }

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The response of a request without `stream`."""
        await collected(texts, [self._answer])
        return self._completed(Items.of(self._answer))

    async def events(self, texts: Texts) -> AsyncIterator[bytes]:
        """The events of a request with `stream`."""
        started = {**self._head, "status": "in_progress", "output": []}
        begun = False
        async for delivery in texts:
            deltas = self._answer.see(delivery)
            if not begun:
                begun = True
                yield self._event("response.created", response=started)
                yield self._event("response.in_progress", response=started)
            if self._progress and isinstance(delivery.event, Joined | PromptRead):
                progress = self._answer.progress.prompt_progress()
                yield self._event("response.in_progress", response=started, prompt_progress=progress)
            for delta in deltas:
                for name, fields in self._items.push(delta):
                    more = {"timings": self._answer.progress.timings()} if self._timings else {}
                    yield self._event(name, **fields, **more)
        for name, fields in self._items.finish():
            yield self._event(name, **fields)
        response = self._completed(self._items.done)
        kind = "response.completed" if response["status"] == "completed" else "response.incomplete"
        yield self._event(kind, response=response, timings=self._answer.progress.timings())

    def failure(self, error: HttpError) -> Sequence[bytes]:
        """The last events of a stream that an error ends."""
        failed = {"code": "server_error", "message": error.message}
        response = {**self._head, "status": "failed", "error": failed, "output": self._items.done}
        return [self._event("response.failed", response=response, **error_object(error))]

    def _completed(self, output: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The whole response. One that reached a limit of tokens is complete here, as for llama.cpp's server."""
        progress = self._answer.progress
        generated, prompt = len(progress.tokens), self._job.job.prompt_tokens
        return {
            **self._head,
            "status": "completed",
            "completed_at": int(time.time()),
            "output": list(output),
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": progress.cached},
                "output_tokens": generated,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + generated,
            },
        }

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return sse({"type": name, "sequence_number": self._number - 1, **fields}, name)
