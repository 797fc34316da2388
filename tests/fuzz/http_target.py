"""Whole HTTP requests, changed in every part, to the server's application in this process, with the shipped model.

What must hold: a success, or an error in the form of the path's protocol, never 500, in one piece or within a stream;
and no text is left behind, also where the client leaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from starlette.routing import Route
from starlette.types import Message, Scope

from fiddler.loading import load
from fiddler.runtime.prefix_cache import PrefixCache
from fiddler.serving.http.app import application
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.service import Service
from fiddler.telemetry.totals import Totals
from fuzz.draw import Draw, changed_json
from fuzz.http_seeds import BODIES, HEADERS, KEYS, METHODS

__all__ = ["REQUESTS", "Exchange", "Server", "http", "server"]

KEY = "sk-the-secret-key"
TEMPLATE = Path(__file__).parents[1] / "data" / "templates" / "hermes.jinja"
STATUSES = {200, 307, 400, 401, 403, 404, 405, 408, 413, 415, 501, 503, 504}
PATIENCE = 30.0  # of one request [s]
REMEMBERED = 256  # blocks of past sequences: else millions of requests fill gigabytes
REQUESTS = tuple(bytes([path, keyed, 0, 0, *rest]) for path in range(45) for keyed in (0, 1) for rest in (b"", b"\2"))
"""Seeds: every path, as it is and with another body, without a key and with one."""


@dataclass
class Exchange:
    """A request's body in parts, and after how many messages of the response the client leaves; what was sent back."""

    parts: list[bytes]
    leaves: int | None = None
    sent: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._gone = asyncio.Event()
        if self.leaves == 0:
            self._gone.set()

    async def receive(self) -> Message:
        """Implements ASGI's receive."""
        if self.parts:
            return {"type": "http.request", "body": self.parts.pop(0), "more_body": bool(self.parts)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Implements ASGI's send."""
        self.sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._gone.set()
        if self.leaves is not None and len(self.sent) >= self.leaves:
            self._gone.set()

    @property
    def status(self) -> int | None:
        """The response's status; None where the client left before."""
        return self.sent[0]["status"] if self.sent else None

    @property
    def body(self) -> bytes:
        """The response's body."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])


class Server:
    """The application twice, without a key and with one, around one service on the shipped model."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._loop = asyncio.new_event_loop()
        self._loop.run_until_complete(self._start())
        self.paths = [route.path for route in self.applications[0].routes if isinstance(route, Route)]

    async def _start(self) -> None:
        template = TEMPLATE.read_text()
        limits: dict[str, Any] = {"token_limit": 4, "queue": 16, "body_limit": 1 << 14, "timeout": 20.0, "parallel": 4}
        options = ServerOptions(chat_template=template, cors_origins=("https://example.org",), **limits)
        keyed = ServerOptions(api_keys=(KEY,), cors_origins=("*",), page=False, metrics=False, slots=False, **limits)
        self.engine = load(device="cpu", context=512, threads=1)
        runner = self.engine.runner
        runner.prefix_cache = PrefixCache(runner.pool, REMEMBERED)
        config = self.engine.config
        totals = Totals(len(config.sparse_layers), config.expert_count)
        self.service = Service(self.engine, options, totals, self.errors.append)
        self.applications = [application(each) for each in (options, keyed)]
        for each in self.applications:
            each.state.service = self.service
        self.service.worker.start()

    def call(self, scope: Scope, exchange: Exchange, which: int = 0) -> None:
        """One request; raises what the application raises, or was reported."""

        async def called() -> None:
            async with asyncio.timeout(PATIENCE):
                await self.applications[which](scope, exchange.receive, exchange.send)

        self._loop.run_until_complete(called())
        assert not self.service.busy, "a text is left behind"
        if self.errors:
            raise self.errors.pop()

    def close(self) -> None:
        """End the worker, its processes and the engine."""
        self._loop.run_until_complete(self.service.stop())
        self._loop.close()
        self.engine.close()


@cache
def server() -> Server:
    """The server of all fuzzed requests: lives as long as the process."""
    return Server()


def scope_of(draw: Draw, path: str, method: str, length: int) -> Scope:
    """A request's head as uvicorn would hand it over: names in lower case, no line breaks in values."""
    headers = [(b"host", b"127.0.0.1:8080"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(length).encode()))
    for _ in range(draw.below(4)):
        name, values = draw.choice(HEADERS)
        value = draw.choice(values) if draw.below(4) else draw.take(draw.below(20)).translate(None, b"\0\r\n")
        kind = draw.below(3)
        if kind != 1:
            headers = [pair for pair in headers if pair[0] != name]
        if kind != 2:
            headers.append((name, value))
    query = draw.take(draw.below(12)).translate(None, b"\0\r\n #") if draw.below(4) == 1 else b""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8080),
        "client": ("127.0.0.1", 40000),
        "scheme": "http",
        "method": method,
        "root_path": "",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogateescape"),
        "query_string": query,
        "headers": headers,
        "state": {},
    }


def body_of(draw: Draw, path: str) -> list[bytes]:
    """A body in one to three parts: a changed one of the path's protocol, or bytes."""
    kind = draw.below(8)
    if kind == 1:
        content = draw.take(draw.below(200))
    else:
        draft = json.loads(json.dumps(BODIES.get(path) or draw.choice(list(BODIES.values()))))
        if kind != 2:
            draft = changed_json(draw, draft, KEYS)
        content = json.dumps(draft).encode()
    if draw.below(8) == 1:
        content = content[: draw.below(len(content) + 1)]
    cut = draw.below(len(content) + 1) if draw.below(4) == 1 else len(content)
    return [part for part in (content[:cut], content[cut:]) if part] or [b""]


def http(data: bytes, folder: Path) -> str | None:
    """A changed request. Returns the message of an error, None for a success."""
    draw, running = Draw(data), server()
    path, which = draw.choice(running.paths), draw.below(2)
    if draw.below(8) == 1:
        path += draw.take(draw.below(12)).decode("utf-8", "surrogateescape").replace("\0", "/")
    method = draw.choice(METHODS) if draw.below(8) == 1 else ("POST" if path in BODIES else "GET")
    parts = body_of(draw, path) if method != "GET" or draw.below(8) == 1 else [b""]
    scope = scope_of(draw, path, method, sum(map(len, parts)))
    if which and draw.below(8) != 1:
        scope["headers"].append((b"authorization", b"Bearer " + KEY.encode()))
    leaves = draw.below(4) if draw.below(4) == 1 or path.startswith("/experts/events") else None
    exchange = Exchange(parts, leaves)
    running.call(scope, exchange, which)
    return checked(exchange, path, method)


def checked(exchange: Exchange, path: str, method: str) -> str | None:
    """The response's form. Returns the message of an error."""
    if exchange.status is None:
        assert exchange.leaves is not None
        return None
    assert exchange.status in STATUSES, (exchange.status, exchange.body[:500])
    kind = dict(exchange.sent[0]["headers"]).get(b"content-type", b"").partition(b";")[0]
    for name, value in exchange.sent[0]["headers"]:
        assert not {*b"\r\n\0"} & {*name, *value}, (name, value)
    if exchange.status >= 400 and method != "HEAD":
        return message_of(json.loads(exchange.body), exchange.status, path)
    if kind == b"application/json" and exchange.leaves is None and method != "HEAD":
        json.loads(exchange.body)
    elif kind == b"text/event-stream":
        for event in events(exchange.body):
            if "error" in event and event["error"] is not None and "code" in event["error"]:
                return message_of(event, None, path)
    return None


def message_of(answer: dict[str, Any], status: int | None, path: str) -> str:
    """The message of an error in the path's form."""
    error = answer["error"]
    assert isinstance(error["type"], str)
    assert error["code"] == (status or error["code"]) != 500, error
    if path.startswith("/v1/messages"):
        assert answer["type"] == "error"
    message: str = error["message"]
    assert message.isprintable(), message
    assert 0 < len(message) < 2000, message
    return message


def events(body: bytes) -> Iterator[dict[str, Any]]:
    """The objects of a stream of events."""
    for line in body.split(b"\n"):
        if line.startswith(b"data: ") and line != b"data: [DONE]":
            yield json.loads(line[6:])
