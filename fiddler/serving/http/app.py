"""All routes, as one ASGI application. Knows which function answers which path; no more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fiddler.errors import FiddlerError
from fiddler.serving.http.anthropic_messages import count_tokens, messages
from fiddler.serving.http.errors import HttpError, http_error
from fiddler.serving.http.experts import expert_events, experts
from fiddler.serving.http.llama_completion import completion
from fiddler.serving.http.llama_text import apply_template, detokenize, tokenize
from fiddler.serving.http.metrics import metrics
from fiddler.serving.http.openai_chat import chat_completions, chat_tokens
from fiddler.serving.http.openai_completions import completions
from fiddler.serving.http.openai_responses import responses, responses_tokens
from fiddler.serving.http.openapi import openapi
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.page import page
from fiddler.serving.http.security import Security, error_response
from fiddler.serving.http.status import health, models, not_supported, properties, slots

__all__ = ["application"]

_GET: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/health": health,
    "/v1/health": health,
    "/v1/models": models,
    "/models": models,
    "/props": properties,
    "/slots": slots,
    "/metrics": metrics,
    "/experts": experts,
    "/experts/events": expert_events,
    "/openapi.json": openapi,
}
_POST: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/v1/chat/completions": chat_completions,
    "/chat/completions": chat_completions,
    "/v1/chat/completions/input_tokens": chat_tokens,
    "/chat/completions/input_tokens": chat_tokens,
    "/v1/completions": completions,
    "/v1/responses": responses,
    "/responses": responses,
    "/v1/responses/input_tokens": responses_tokens,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
    "/completion": completion,
    "/completions": completion,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
}
_NOT_SUPPORTED = (
    *("/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/reranking", "/v1/reranking"),
    *("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech", "/infill", "/lora-adapters"),
    *("/v1/images/generations", "/v1/moderations", "/v1/fine_tuning/jobs", "/v1/batches", "/v1/files", "/tools"),
)


def application(options: ServerOptions) -> Starlette:
    """The routes of a server; its `state.service` must be set before the first request."""
    routes = [Route(path, answer, methods=["GET"]) for path, answer in _GET.items()]
    routes += [Route(path, answer, methods=["POST"]) for path, answer in _POST.items()]
    routes += [Route(path, not_supported, methods=["GET", "POST"]) for path in _NOT_SUPPORTED]
    if options.page:
        routes.append(Route("/", page, methods=["GET"]))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Security, options=options)],
        exception_handlers={
            HTTPException: _routing_error,
            HttpError: _error,
            FiddlerError: _error,
            TimeoutError: _error,
            Exception: _error,  # whatever else there is; starlette raises it again, and uvicorn closes the connection
        },
    )


async def _routing_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"]  # `request.url` is parsed again from the Host header
    text = {404: f"there is no {path[:200]!a} here", 405: f"{request.method[:20]!a} is not for this path"}
    return error_response(HttpError(error.status_code, text.get(error.status_code, error.detail)), path)


async def _error(request: Request, error: Exception) -> Response:
    known = http_error(error)
    if known.status == 500:
        request.app.state.service.report(error)
    return error_response(known, request.scope["path"])
