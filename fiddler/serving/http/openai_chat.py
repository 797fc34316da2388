"""OpenAI's chat completions (https://platform.openai.com/docs/api-reference/chat), with llama.cpp's additions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.generation.events import Joined, PromptRead
from fiddler.serving.answer_parts import Delta
from fiddler.serving.http.answers import Answer, ChatJob, chat_job, collected
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.conversations import conversation_of
from fiddler.serving.http.ids import fingerprint, random_id
from fiddler.serving.http.llama_results import final_result
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.http.sse import DONE, JsonAnswer, sse, unless_gone
from fiddler.serving.request_fields import flag

__all__ = ["chat_completions", "chat_tokens", "usage_of"]


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service, body = service_of(request), await read_object(request, generates=True)
    job = await chat_job(service, body, conversation_of(body))
    answering = _Answering(service, job, body)
    texts = service.open(job.job.requests, body)
    if texts.streamed:
        return service.stream(answering.events(texts), texts)
    try:
        answered = await unless_gone(request, answering.whole(texts))
    finally:
        texts.close()
    return JsonAnswer(answered)


async def chat_tokens(request: Request) -> Response:
    """POST /v1/chat/completions/input_tokens: the number of the prompt's tokens."""
    service, body = service_of(request), await read_object(request)
    prompt = await service.on_text(service.prompts.prompt, conversation_of(body))
    return JsonAnswer({"input_tokens": len(prompt.ids)})


def usage_of(job: ChatJob, answers: list[Answer]) -> dict[str, Any]:
    """Numbers of tokens."""
    prompt = job.job.prompt_tokens
    generated = sum(len(answer.progress.tokens) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": answers[0].progress.cached},
    }


class _Answering:
    """One request: its answers in one piece, or as chunks."""

    def __init__(self, service: Service, job: ChatJob, body: Mapping[str, Any]) -> None:
        self._service, self._job, self._body = service, job, body
        self._answers = job.answers()
        self._probs = job.job.settings.sampling.n_probs > 0
        options = body.get("stream_options")
        self._usage = isinstance(options, dict) and flag(options, "include_usage")
        self._timings, self._progress = flag(body, "timings_per_token"), flag(body, "return_progress")
        self._head = {
            "id": random_id("chatcmpl-"),
            "object": "chat.completion",
            "created": int(time.time()),
            "model": service.names[0],
            "system_fingerprint": fingerprint(service),
        }

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The response of a request without `stream`."""
        await collected(texts, self._answers)
        choices = [self._choice(index, answer) for index, answer in enumerate(self._answers)]
        result = {**self._head, "choices": choices, "usage": usage_of(self._job, self._answers)}
        result["timings"] = self._answers[0].progress.timings()
        if flag(self._body, "verbose"):
            first = self._answers[0]
            result["__verbose"] = final_result(self._service, self._job.job, 0, first.progress, first.content)
        return result

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if answer.calls else "")}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        choice = {"index": index, "message": message, "finish_reason": answer.finish_reason}
        if self._probs:
            choice["logprobs"] = {"content": answer.log_probs(self._service.pieces)}
        return choice

    async def events(self, texts: Texts) -> AsyncIterator[bytes]:
        """The chunks of a request with `stream`."""
        self._head["object"] = "chat.completion.chunk"
        begun: set[int] = set()
        async for delivery in texts:
            index, answer = delivery.number, self._answers[delivery.number]
            deltas = answer.see(delivery)
            if index not in begun:
                begun.add(index)
                yield sse(self._chunk(index, {"role": "assistant", "content": None}))
            if self._progress and isinstance(delivery.event, Joined | PromptRead):
                yield sse(self._chunk(index, {}, answer, prompt_progress=answer.progress.prompt_progress()))
            for delta in deltas:
                yield sse(self._chunk(index, _delta(delta), answer, probs=self._probs))
            if answer.progress.completion is not None:
                yield sse(self._last(index, answer))
        if self._usage:
            timings = self._answers[0].progress.timings()
            usage = usage_of(self._job, self._answers)
            yield sse({**self._head, "choices": [], "usage": usage, "timings": timings})
        yield DONE

    def _chunk(
        self, index: int, delta: dict[str, Any], answer: Answer | None = None, *, probs: bool = False, **more: Any
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": None}
        if probs and answer is not None:
            choice["logprobs"] = {"content": answer.log_probs(self._service.pieces)}
        if self._timings and answer is not None:
            more["timings"] = answer.progress.timings()
        return {**self._head, "choices": [choice], **more, **({"usage": None} if self._usage else {})}

    def _last(self, index: int, answer: Answer) -> dict[str, Any]:
        """The chunk with the reason for the end; log-probabilities of tokens without text go with it."""
        chunk = self._chunk(index, {})
        chunk["choices"][0]["finish_reason"] = answer.finish_reason
        if self._probs and (rest := answer.log_probs(self._service.pieces)):
            chunk["choices"][0]["logprobs"] = {"content": rest}
        if not self._usage:
            chunk["timings"] = answer.progress.timings()
        return chunk


def _delta(delta: Delta) -> dict[str, Any]:
    """A delta as OpenAI has it: the name of a call comes once, with its id; its index always."""
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    if delta.kind == "arguments":
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}
    function = {"name": delta.text, "arguments": ""}
    return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
