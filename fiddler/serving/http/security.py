"""Who may ask what: API keys, Host headers, types of bodies and web origins. An ASGI middleware; knows no model.

A web page elsewhere must not reach a server on somebody's desk. It can send simple requests to any address, but none
with a body of `application/json` unless the server agrees (CORS); and it can point its own name at 127.0.0.1 (DNS
rebinding), but then the Host header has that name.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fiddler.serving.http.errors import HttpError, error_object
from fiddler.serving.http.options import ServerOptions, is_loopback

__all__ = ["PUBLIC", "Security", "error_response", "host_of"]

PUBLIC = ("/", "/health", "/v1/models")
"""Paths that need no key."""

_LINGER = 2.0  # for the rest of a body that nobody reads [s]
_DISCARDED = 1 << 26  # of it [bytes]

_ANY_ADDRESS = ("0.0.0.0", "::")
_METHODS = "GET, POST, OPTIONS"


class Security:
    """Refuses what a server's options do not allow, before any route sees it."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options
        self._keys = [key.encode() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = self._allowed_origin(headers.get("origin"))
        error = self._refusal(scope, headers)
        exchange = _Exchange(receive, send, origin, has_body=_has_body(headers))
        if error is not None:
            response: ASGIApp = error_response(error, scope["path"])
        elif scope["method"] == "OPTIONS":
            response = Response(status_code=200, headers=_preflight(origin))
        else:
            response = self._app
        await response(scope, exchange.receive, exchange.send)

    def _refusal(self, scope: Scope, headers: Headers) -> HttpError | None:
        """Why a request is refused; None where it is not."""
        if not scope["query_string"].isascii():  # starlette cannot read it, nor answer with an error
            return HttpError(400, "the query string has a byte beyond ASCII; write it as %XX")
        if not self._keys and not _host_allowed(headers.getlist("host"), self._options.host):
            return HttpError(403, "the Host header names another host; call the server by --host, or set an API key")
        if scope["method"] == "OPTIONS":
            return None
        if self._keys and scope["path"] not in PUBLIC and not self._has_key(headers):
            return HttpError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY")
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return HttpError(415, "the body must have the Content-Type application/json")
        return None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = [key.strip()] if scheme.lower() == "bearer" else []
        given += [headers["x-api-key"]] if "x-api-key" in headers else []  # Anthropic's clients
        matches = [hmac.compare_digest(each.encode(), key) for each in given for key in self._keys]
        return any(matches)

    def _allowed_origin(self, origin: str | None) -> str | None:
        """The origin, if a page from there may call the server."""
        allowed = self._options.cors_origins
        return origin if origin is not None and ("*" in allowed or origin in allowed) else None


def host_of(header: str) -> str:
    """The host in a Host header, without port and brackets."""
    header = header.strip()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _host_allowed(headers: Sequence[str], bound: str) -> bool:
    if len(headers) != 1:
        return False
    host = host_of(headers[0])
    if is_loopback(host) or host.lower() == bound.lower():
        return True
    if bound not in _ANY_ADDRESS:
        return False
    try:  # an address is no name that a stranger could point here
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _preflight(origin: str | None) -> dict[str, str]:
    if origin is None:
        return {}
    return {
        "Access-Control-Allow-Methods": _METHODS,
        "Access-Control-Allow-Headers": "Authorization, Content-Type, X-Api-Key",
        "Access-Control-Max-Age": "600",
    }


def _has_body(headers: Headers) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


class _Exchange:
    """A request and its response: adds the headers that every response has.

    A connection whose request was answered before its body was read is closed, and the response says so. What is still
    arriving is read first, within limits: a socket that is closed with unread bytes resets the connection, and the
    client would lose the response (RFC 9112, 9.6).
    """

    def __init__(self, receive: Receive, send: Send, origin: str | None, *, has_body: bool) -> None:
        self._receive, self._send, self._unread = receive, send, has_body
        self._headers = [(b"x-content-type-options", b"nosniff")]
        if origin is not None:
            self._headers += [
                (b"Access-Control-Allow-Origin", origin.encode("latin-1", "replace")),
                (b"Vary", b"Origin"),
            ]

    async def receive(self) -> Message:
        """The next message of the request (ASGI)."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        """Send a message of the response (ASGI)."""
        if message["type"] == "http.response.start":
            more = [(b"connection", b"close")] if self._unread else []
            message = {**message, "headers": [*message.get("headers", []), *self._headers, *more]}
        if message["type"] == "http.response.body" and self._unread and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._discard_body()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _discard_body(self) -> None:
        size = 0
        try:
            async with asyncio.timeout(_LINGER):
                while self._unread and size < _DISCARDED:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        return
                    size += len(message.get("body", b""))
        except TimeoutError:
            return


def error_response(error: HttpError, path: str) -> Response:
    """An error as a response, in the form of the path's protocol."""
    headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    content = error_object(error, anthropic=path.startswith("/v1/messages"))
    return JSONResponse(content, error.status, headers)
