"""The time of one request: an answer in one piece that takes longer is a 504, a stream ends with an error."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tools.server_process import ServerProcess

SECONDS = 1
ENDLESS = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "n": 32}


@pytest.fixture(scope="module")
def http():
    """A client of a server whose requests have a second."""
    with ServerProcess("--timeout", str(SECONDS), "-np", "8") as process, httpx.Client(base_url=process.url) as client:
        yield client


def test_an_answer_that_takes_too_long_is_a_504_and_ends_its_texts(http):
    begun = time.monotonic()
    answer = http.post("/v1/completions", json=ENDLESS, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, 504)
    assert time.monotonic() - begun >= SECONDS
    answer = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 3}, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_a_stream_that_takes_too_long_has_an_error_for_its_last_event(http):
    answer = http.post("/v1/completions", json={**ENDLESS, "stream": True}, timeout=60)
    assert answer.status_code == 200
    *events, last = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert events
    assert last["error"]["code"] == 504
