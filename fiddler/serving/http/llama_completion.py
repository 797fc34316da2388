"""llama.cpp's own `/completion`: the text of a prompt, with its settings, probabilities and times."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.errors import RequestError, quoted
from fiddler.generation.events import Joined, PromptRead, Token
from fiddler.serving.http.body import read_object, service_of
from fiddler.serving.http.jobs import Job, job_of
from fiddler.serving.http.llama_results import final_result, partial_result, probabilities, selected_fields
from fiddler.serving.http.openai_completions import prompts_of
from fiddler.serving.http.progress import Progress
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.http.sse import DONE, JsonAnswer, sse, unless_gone
from fiddler.serving.request_fields import flag

__all__ = ["completion"]


async def completion(request: Request) -> Response:
    """POST /completion. Several prompts, or several choices, give a list of results."""
    service, body = service_of(request), await read_object(request, generates=True)
    fields = body.get("response_fields") or []
    if not isinstance(fields, list) or not all(isinstance(path, str) for path in fields):
        raise RequestError(f"response_fields are {quoted(fields)}; give a list of names")
    job = await job_of(service, body, await prompts_of(service, body))
    completing = _Completing(service, job, body, fields)
    texts = service.open(job.requests, body)
    if texts.streamed:
        return service.stream(completing.events(texts), texts)
    try:
        results = await unless_gone(request, completing.whole(texts))
    finally:
        texts.close()
    return JsonAnswer(results[0] if results is not None and len(results) == 1 else results)


class _Completing:
    """One request: its results in one piece, or as events."""

    def __init__(self, service: Service, job: Job, body: Mapping[str, Any], fields: list[str]) -> None:
        self._service, self._job, self._fields = service, job, fields
        self._progress = [Progress() for _ in job.requests]
        self._probs = job.settings.sampling.n_probs > 0
        self._returns_tokens = flag(body, "return_tokens")
        self._timings, self._tells_progress = flag(body, "timings_per_token"), flag(body, "return_progress")

    async def whole(self, texts: Texts) -> list[dict[str, Any]]:
        """The results of a request without `stream`."""
        async for delivery in texts:
            self._progress[delivery.number].see(delivery)
        results = []
        for index, progress in enumerate(self._progress):
            assert progress.completion is not None
            result = final_result(self._service, self._job, index, progress, progress.completion.text)
            if self._returns_tokens:
                result["tokens"] = progress.tokens
            if self._probs:
                result["completion_probabilities"] = probabilities(progress.probs, self._service.pieces)
            results.append(selected_fields(result, self._fields) if self._fields else result)
        return results

    async def events(self, texts: Texts) -> AsyncIterator[bytes]:
        """The events of a request with `stream`."""
        sent = [0] * len(self._progress)  # tokens of each text, in events so far
        async for delivery in texts:
            index, progress, event = delivery.number, self._progress[delivery.number], delivery.event
            progress.see(delivery)
            prompt = len(self._job.prompts[index])
            if self._tells_progress and isinstance(event, Joined | PromptRead):
                result = partial_result(index, progress, "", [], prompt)
                yield sse({**result, **self._timed(progress), "prompt_progress": progress.prompt_progress()})
            if isinstance(event, Token) and event.text:
                first, sent[index] = sent[index], len(progress.tokens)
                result = partial_result(index, progress, event.text, progress.tokens[first:], prompt)
                if self._probs:
                    result["completion_probabilities"] = probabilities(progress.probs[first:], self._service.pieces)
                yield sse(result | self._timed(progress))
            if progress.completion is not None:
                result = final_result(self._service, self._job, index, progress, "")
                result["generation_settings"]["stream"] = True
                yield sse(selected_fields(result, self._fields) if self._fields else result)
        yield DONE

    def _timed(self, progress: Progress) -> dict[str, Any]:
        return {"timings": progress.timings()} if self._timings else {}
