"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) and answers in one piece.

Both end their texts as soon as the client leaves. A stream sends a comment where nothing else has come for a while, so
that nobody in between closes the connection while a long prompt is read. Knows no protocol.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fiddler.serving.http.errors import HttpError, error_object, http_error

__all__ = ["DONE", "EventStream", "JsonAnswer", "sse", "to_bytes", "unless_gone"]

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
_PING = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def to_bytes(content: object) -> bytes:
    """JSON in UTF-8; a lone surrogate, which a client may have sent, becomes a question mark."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def sse(content: object, event: str | None = None) -> bytes:
    """One event with JSON for data."""
    name = b"" if event is None else b"event: " + event.encode() + b"\n"
    return name + b"data: " + to_bytes(content) + b"\n\n"


class JsonAnswer(JSONResponse):
    """A response of JSON."""

    def render(self, content: Any) -> bytes:
        """Implements `JSONResponse.render`."""
        return to_bytes(content)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None, and `work` is cancelled, where the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        await _cancelled(task, gone)


class EventStream(Response):
    """A response whose events come one by one. An error before the first one is a response with its status."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        *,
        ping: float,
        timeout: float,
        failure: Callable[[HttpError], Sequence[bytes]] | None = None,
        report: Callable[[BaseException], None] = lambda error: None,
    ) -> None:
        """close: called at the end, however it comes. ping: seconds of silence before a comment; 0 for none.

        timeout: of the whole response [s], also where the client reads nothing. failure: the last events where an
        error ends the stream. report: receives errors that nobody foresaw.
        """
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._events, self._close, self._ping, self._timeout = events, close, ping, timeout
        self._failure, self._report = failure or (lambda error: [sse(error_object(error))]), report
        self._sending, self._last = asyncio.Lock(), 0.0  # one message at a time; when it was sent, by the loop's clock
        self._started = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (ASGI)."""
        self._last = asyncio.get_running_loop().time()
        gone, events = asyncio.ensure_future(_gone(receive)), asyncio.ensure_future(self._send_events(send))
        pings = [asyncio.ensure_future(self._send_pings(send))] if self._ping else []
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.wait({gone, events}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            if not self._started:
                raise
        else:
            if events.done():
                events.result()  # raises its error
        finally:
            self._close()
            await _cancelled(gone, events, *pings)

    async def _send_events(self, send: Send) -> None:
        """Send all events. Raises an error that comes before all of them."""
        while True:
            try:
                event, last = await anext(self._events, None), b""
            except Exception as error:
                known = http_error(error)
                if known.status == 500:
                    self._report(error)
                if not self._started:
                    self._ended = True  # else a comment could come before the error
                    raise known from error
                event, last = None, b"".join(self._failure(known))
            if event is None:
                await self._send(send, last, ended=True)
                return
            await self._send(send, event)

    async def _send_pings(self, send: Send) -> None:
        """Send comments as long as there are silences."""
        while True:
            quiet = asyncio.get_running_loop().time() - self._last
            if quiet >= self._ping:
                await self._send(send, _PING)
                quiet = 0.0
            await asyncio.sleep(self._ping - quiet)

    async def _send(self, send: Send, part: bytes, *, ended: bool = False) -> None:
        async with self._sending:
            if self._ended:
                return
            if not self._started:
                self._started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._ended = ended
            await send({"type": "http.response.body", "body": part, "more_body": not ended})
            self._last = asyncio.get_running_loop().time()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
