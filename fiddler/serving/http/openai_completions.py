"""OpenAI's completions (https://platform.openai.com/docs/api-reference/completions)."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.errors import RequestError, quoted
from fiddler.generation.events import Finished, Joined, PromptRead, Token
from fiddler.sampling.logprobs import LogProbs
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.ids import fingerprint, random_id
from fiddler.serving.http.jobs import Job, encoded, job_of
from fiddler.serving.http.progress import Progress, texts_of
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.http.sse import DONE, JsonAnswer, sse, unless_gone
from fiddler.serving.request_fields import flag, settings_of

__all__ = ["completions", "prompts_of"]


async def completions(request: Request) -> Response:
    """POST /v1/completions."""
    service, body = service_of(request), await read_object(request, generates=True)
    if body.get("suffix"):
        raise HttpError(400, "suffix: no model here fills in the middle; leave it out")
    if flag(body, "echo") and body.get("logprobs") not in (None, False):
        raise HttpError(400, "echo with logprobs is not supported: there are none of the prompt")
    job = await job_of(service, body, await prompts_of(service, body))
    completing = _Completing(service, job, body)
    texts = service.open(job.requests, body)
    if texts.streamed:
        return service.stream(completing.events(texts), texts)
    try:
        completed = await unless_gone(request, completing.whole(texts))
    finally:
        texts.close()
    return JsonAnswer(completed)


async def prompts_of(service: Service, body: Mapping[str, Any]) -> list[list[int]]:
    """The ids of a body's prompts. Raises RequestError where there is none."""
    if body.get("prompt") is None:
        raise RequestError(f"the prompt is {quoted(body.get('prompt'))}; give a text or token ids")
    special = settings_of({"special": body.get("special")}, service.options.defaults).special
    return await service.on_text(encoded, service, body["prompt"], special)


class _Completing:
    """One request: its texts in one piece, or as chunks."""

    def __init__(self, service: Service, job: Job, body: Mapping[str, Any]) -> None:
        self._service, self._job, self._body = service, job, body
        self._progress = [Progress() for _ in job.requests]
        self._offsets = [0] * len(job.requests)  # characters so far, of texts whose log-probabilities are wanted
        self._probs = job.settings.sampling.n_probs > 0
        options = body.get("stream_options")
        self._usage = isinstance(options, dict) and flag(options, "include_usage")
        self._timings, self._tells_progress = flag(body, "timings_per_token"), flag(body, "return_progress")
        self._echo = flag(body, "echo")
        self._head = {
            "id": random_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.names[0],
            "system_fingerprint": fingerprint(service),
        }

    async def whole(self, texts: Texts) -> dict[str, Any]:
        """The response of a request without `stream`."""
        async for delivery in texts:
            self._progress[delivery.number].see(delivery)
        choices = []
        for index, progress in enumerate(self._progress):
            assert progress.completion is not None
            choice = self._choice(index, self._echoed(index) + progress.completion.text, progress.probs)
            choices.append({**choice, "finish_reason": progress.completion.finish_reason})
        timings = self._progress[0].timings()
        return {**self._head, "choices": choices, "usage": self._used(), "timings": timings}

    async def events(self, texts: Texts) -> AsyncIterator[bytes]:
        """The chunks of a request with `stream`."""
        logged, begun = [0] * len(self._progress), set[int]()
        async for delivery in texts:
            index, progress, event = delivery.number, self._progress[delivery.number], delivery.event
            progress.see(delivery)
            if self._tells_progress and isinstance(event, Joined | PromptRead):
                yield sse(self._chunk(index, "", [], prompt_progress=progress.prompt_progress()))
            if self._echo and index not in begun:
                yield sse(self._chunk(index, self._echoed(index), []))
            begun.add(index)
            if isinstance(event, Token) and event.text:
                steps, logged[index] = progress.probs[logged[index] :], len(progress.probs)
                more = {"timings": progress.timings()} if self._timings else {}
                yield sse(self._chunk(index, event.text, steps, **more))
            elif isinstance(event, Finished):
                chunk = self._chunk(index, "", progress.probs[logged[index] :])
                chunk["choices"][0]["finish_reason"] = event.result.finish_reason  # type: ignore[union-attr]
                yield sse(chunk if self._usage else {**chunk, "timings": progress.timings()})
        if self._usage:
            timings = self._progress[0].timings()
            yield sse({**self._head, "choices": [], "usage": self._used(), "timings": timings})
        yield DONE

    def _echoed(self, index: int) -> str:
        prompt = self._job.prompts[index]
        tokenizer = self._service.engine.tokenizer
        return tokenizer.decode(prompt) if self._echo else ""

    def _chunk(self, index: int, text: str, steps: Sequence[LogProbs], **more: Any) -> dict[str, Any]:
        return {
            **self._head,
            "choices": [self._choice(index, text, steps)],
            **more,
            **({"usage": None} if self._usage else {}),
        }

    def _choice(self, index: int, text: str, steps: Sequence[LogProbs]) -> dict[str, Any]:
        log_probs = self._log_probs(index, steps) if self._probs else None
        return {"index": index, "text": text, "logprobs": log_probs, "finish_reason": None}

    def _log_probs(self, index: int, steps: Sequence[LogProbs]) -> dict[str, Any]:
        """As the completions API has them: parallel lists."""
        pieces, wanted = self._service.pieces, self._job.settings.sampling.n_probs
        tokens = [texts_of([step.token], pieces) for step in steps]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [{texts_of([each], pieces): p for each, p in step.top[:wanted]} for step in steps],
            "text_offset": offsets,
        }

    def _used(self) -> dict[str, Any]:
        generated = sum(len(progress.tokens) for progress in self._progress)
        prompt = self._job.prompt_tokens
        cached = sum(progress.cached for progress in self._progress[:: self._job.settings.choices])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
