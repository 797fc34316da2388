"""Every field of every route with values of other types and at their upper ends: an answer or one short line, soon."""

from __future__ import annotations

import json
import time
from collections import defaultdict

import pytest

from fiddler.serving.http.app import application
from fiddler.serving.http.openapi import description, openapi
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.page import page
from fiddler.serving.http.status import not_supported

GIVEN = {
    "/tokenize": {"content": "x"},
    "/detokenize": {"tokens": [5]},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    "/apply-template": {"messages": [{"role": "user", "content": "x"}]},
    "/completion": {"prompt": "x", "n_predict": 2},
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
}
UNDESCRIBED = (
    *(
        "metadata",
        "user",
        "suffix",
        "echo",
        "best_of",
        "tool_choice",
        "thinking",
        "priority",
        "dry_base",
        "top_n_sigma",
    ),
    *("dry_sequence_breakers", "response_fields", "sse_ping_interval", "previous_response_id", "xtc_threshold"),
)
VALUES = (
    *("true", "-1", "1.5", "1e308", "1e400", str(2**63), "1" * 4400, '""', '"\\ud800\\u0000"', "[]", "{}", "[null]"),
    *("[" * 800 + "]" * 800, json.dumps("a" * 100_000), json.dumps(["x"] * 5000)),
    *(json.dumps([{"type": "text", "text": 1}]), json.dumps({"type": "json_schema", "json_schema": {"schema": 1}})),
)
ROUTES = description("")["paths"]
SECONDS = 20.0  # beside other requests, on a busy machine


def fields_of(path):
    body = ROUTES[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return sorted({*body["properties"], *UNDESCRIBED})


def test_every_route_that_reads_fields_is_tried():
    aliases = {"/completions", "/chat/completions", "/responses"}
    counts = {path for path in ROUTES if path.endswith(("input_tokens", "count_tokens"))}
    posts = {path for path, methods in ROUTES.items() if "requestBody" in methods.get("post", {})}
    assert posts - aliases - counts == GIVEN.keys()


def test_every_route_is_described_under_one_of_its_paths():
    paths = defaultdict(set)
    for route in application(ServerOptions()).routes:
        paths[route.endpoint] |= {(route.path, method.lower()) for method in route.methods}
    for answer in (page, openapi, not_supported):
        del paths[answer]
    described = {(path, method) for path, methods in ROUTES.items() for method in methods}
    assert described <= set().union(*paths.values())
    assert [each for each in paths.values() if not each & described] == []


@pytest.mark.parametrize("path", GIVEN)
def test_no_field_hangs_or_fails_the_server(http, path):
    for name in fields_of(path):
        rest = {key: value for key, value in GIVEN[path].items() if key != name}
        for value in VALUES:
            body = f"{json.dumps({**rest, name: None})[:-5]}{value}}}"
            began = time.monotonic()
            answer = http.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
            case = f"{name}: {value[:60]}: {answer.status_code} {answer.text[:300]}"
            assert time.monotonic() - began < SECONDS, case
            assert 200 <= answer.status_code < 500, case
            if answer.status_code >= 400:
                message = answer.json()["error"]["message"]
                assert len(message) < 500, case
                assert message.isprintable(), case


def test_no_refused_request_holds_a_place_in_the_queue(http):
    """All 256 places are free, whatever came before."""
    body = {"prompt": ["x", "y"], "n": 128, "n_predict": 1}
    assert len(http.post("/completion", json=body).json()) == 256
