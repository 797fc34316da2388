"""Streams of events beside their comments, and which requests an idle server waits for."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.sse import EventStream
from fuzz.draw import Draw
from fuzz.http_seeds import BODIES
from fuzz.http_target import Exchange, Server, scope_of


async def responses(events, **options):
    """The messages that a response of these events sends."""
    sent, forever = [], asyncio.Event()

    async def send(message):
        sent.append(message)

    try:
        await EventStream(events, lambda: None, timeout=60, **options)({"type": "http"}, forever.wait, send)
    except HttpError as error:
        sent.append(error)
    return sent


def test_no_comment_comes_before_an_error_that_comes_before_all_events():
    """Both are due at once, as where the event loop was busy."""

    async def failing():
        await asyncio.sleep(0.02)
        raise HttpError(404, "no such thing")
        yield b""

    async def run():
        answer = asyncio.ensure_future(responses(failing(), ping=0.03))
        await asyncio.sleep(0.01)
        time.sleep(0.05)
        return await answer

    (error,) = asyncio.run(run())
    assert error.status == 404


GENERATES = "/completion", "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
OTHERS = "/tokenize", "/detokenize", "/apply-template", "/v1/messages/count_tokens", "/v1/chat/completions/input_tokens"


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


@pytest.mark.parametrize("path", [*GENERATES, *OTHERS])
def test_an_idle_server_waits_for_requests_that_generate_and_for_no_others(path, server, monkeypatch):
    arriving, expect = [], server.service.worker.expect
    monkeypatch.setattr(server.service.worker, "expect", lambda count: (arriving.append(count), expect(count)))
    body = json.dumps(BODIES[path]).encode()
    exchange = Exchange([body])
    server.call(scope_of(Draw(b""), path, "POST", len(body)), exchange)
    assert exchange.status in (200, 400)  # some seeds ask for what is not there, which is found later
    assert (1 in arriving) is (path in GENERATES)
