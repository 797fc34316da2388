"""Errors as HTTP statuses and as the JSON of each protocol. Knows no routes."""

from __future__ import annotations

from typing import Any

from fiddler.errors import FiddlerError, RequestError, ResourceError

__all__ = ["ContextError", "HttpError", "StoppingError", "error_object", "http_error"]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    501: "not_supported_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class HttpError(Exception):
    """An error with its HTTP status. `more`: further fields of its JSON. `retry`: after how long to try again [s]."""

    def __init__(
        self, status: int, message: str, kind: str | None = None, *, retry: int | None = None, **more: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.retry, self.more = status, message, retry, more
        self.kind = kind or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


class StoppingError(FiddlerError):
    """The server is about to end."""


class ContextError(RequestError):
    """A prompt that the context cannot hold. `tokens`: of the prompt, or at least so many. `context`: positions."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens, and the context {context}; shorten it, or raise --ctx")
        self.tokens, self.context = tokens, context


def http_error(error: BaseException) -> HttpError:
    """Any error as one with a status. One that nobody foresaw is a 500 that tells nothing of its cause."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, ContextError):
        more = {"n_prompt_tokens": error.tokens, "n_ctx": error.context}
        return HttpError(400, str(error), "exceed_context_size_error", **more)
    if isinstance(error, RequestError):
        return HttpError(400, str(error))
    if isinstance(error, StoppingError):
        return HttpError(503, str(error), retry=10)
    if isinstance(error, ResourceError):
        return HttpError(503, str(error), retry=10)
    if isinstance(error, FiddlerError):
        return HttpError(500, str(error))
    if isinstance(error, TimeoutError):
        return HttpError(504, "the request took longer than --timeout allows")
    return HttpError(500, f"internal: {type(error).__name__}; the server's log has more")


def error_object(error: HttpError, *, anthropic: bool = False) -> dict[str, Any]:
    """The JSON of an error: {"error": {code, message, type}}, with Anthropic's `type` beside it where it is theirs."""
    inner = {"code": error.status, "message": error.message, "type": error.kind, **error.more}
    return {"type": "error", "error": inner} if anthropic else {"error": inner}
