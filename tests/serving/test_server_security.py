"""Who may ask the server what: keys route by route, Host headers, types of bodies, web origins, limits."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from fiddler.errors import RequestError
from fiddler.serving.http.app import application
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.security import PUBLIC
from tools.server_process import KEY

ROUTES = sorted(
    (method, route.path) for route in application(ServerOptions()).routes for method in route.methods & {"GET", "POST"}
)
SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
ELSEWHERE = (
    "evil.example",
    "evil.example:8080",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "10.0.0.1",
    "",
    "[::2]",
)
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def keyed(keyed_server):
    with httpx.Client(base_url=keyed_server.url, timeout=300) as client:
        yield client


def is_error(response, status, kind):
    error = response.json()["error"]
    return (response.status_code, error["code"], error["type"]) == (status, status, kind) and bool(error["message"])


def test_the_routes_are_all_there():
    assert len(ROUTES) > 40
    assert {path for _, path in ROUTES} >= {*PUBLIC, "/v1/messages", "/experts/events", "/metrics", "/slots"}


@pytest.mark.parametrize("method, path", ROUTES)
def test_every_route_but_three_needs_the_key(keyed, method, path):
    if path in PUBLIC:
        assert keyed.request(method, path).status_code == 200
        return
    body = {"json": {}} if method == "POST" else {}
    wrong = [{}, {"Authorization": "Bearer sk-wrong"}, {"Authorization": KEY}, {"Authorization": "Basic " + KEY}]
    wrong += [{"X-Api-Key": "sk-wrong"}, {"Authorization": "Bearer"}, {"X-Api-Key": KEY + "x"}]
    for headers in wrong if path == "/completion" else wrong[:2]:
        assert is_error(keyed.request(method, path, headers=headers, **body), 401, "authentication_error")


@pytest.mark.parametrize("path", ["/no-such-path", "/v1/models/", "/v1/completions/x", "/%2e%2e/health"])
def test_paths_that_are_none_need_the_key_too(keyed, path):
    assert keyed.get(path).status_code == 401
    assert keyed.get(path, headers=WITH_KEY).status_code in (404, 307)


@pytest.mark.parametrize("host", ["x/v1/messages?", "x/health?", "x/health#", "[", "a]b", "@", ""])
def test_a_host_header_that_looks_like_another_path_changes_nothing(keyed, host):
    """Early releases of starlette build `request.url` from it (CVE-2026-48710)."""
    assert keyed.get("/slots", headers={"Host": host}).status_code == 401
    answer = keyed.get("/no-such-path", headers={**WITH_KEY, "Host": host})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "there is no '/no-such-path' here")
    assert "type" not in answer.json()  # as errors of /v1/messages have


def test_an_error_names_a_path_in_one_printable_line(http):
    for path, status, shown in (
        ("/v1/fine_tuning/jobs%0A", 501, "/v1/fine_tuning/jobs%0A is not supported: fiddler only generates text"),
        ("/v1/rerank", 501, "/v1/rerank is not supported: fiddler only generates text"),
        ("/nothing%0A%1B", 404, r"there is no '/nothing\n\x1b' here"),
    ):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (status, shown)


@pytest.mark.parametrize("headers", [WITH_KEY, {"authorization": f"bearer {KEY}"}, {"X-Api-Key": KEY}])
def test_the_key_is_taken_from_either_header(keyed, headers):
    answer = keyed.post("/completion", json={"prompt": "Once", "n_predict": 2}, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["tokens_predicted"] == 2


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
@pytest.mark.parametrize("path", sorted(path for method, path in ROUTES if method == "POST"))
def test_a_body_that_a_web_page_can_send_anywhere_is_refused(http, path, kind):
    answer = http.post(path, content=b'{"prompt": "Once"}', headers={"Content-Type": kind} if kind else {})
    assert is_error(answer, 415, "invalid_request_error")


@pytest.mark.parametrize("host", ELSEWHERE)
def test_a_name_that_a_stranger_could_point_here_is_refused(http, host):
    for path in ("/", "/health", "/v1/models", "/props"):
        assert is_error(http.get(path, headers={"Host": host}), 403, "permission_error")
    assert http.post("/completion", json={"prompt": "Once"}, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:1", "127.9.9.9", "[::1]:8080", "localhost."])
def test_names_of_this_machine_are_taken(http, host):
    assert http.get("/health", headers={"Host": host}).status_code == 200


def test_with_a_key_any_host_is_taken(keyed):
    assert keyed.get("/props", headers={"Host": "gpu.example", **WITH_KEY}).status_code == 200


def test_no_origin_is_allowed_unless_asked_for(http):
    for origin in ("http://evil.example", "null", "http://localhost:3000"):
        answer = http.options("/completion", headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = http.get("/v1/models", headers={"Origin": origin})
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_has_a_strict_policy_and_nothing_is_sniffed(http):
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.text.startswith("<!doctype html>")


def test_a_large_body_is_refused_before_it_is_read(keyed):
    body = b'{"prompt": "' + b"a" * (1 << 20) + b'"}'
    headers = {**WITH_KEY, "Content-Type": "application/json"}
    assert is_error(keyed.post("/completion", content=body, headers=headers), 413, "invalid_request_error")

    def pieces():
        yield body[: 1 << 19]
        yield body[1 << 19 :]

    assert keyed.post("/completion", content=pieces(), headers=headers).status_code == 413


@pytest.mark.parametrize("path, headers", [("/completion", {}), ("/tokenize", WITH_KEY), ("/no-such-path", WITH_KEY)])
def test_a_client_that_is_still_sending_gets_the_refusal(keyed, path, headers):
    """The answer comes before the body was read; a client that reads it after the last byte must find it."""
    size = 1 << 23
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {size}"]
    lines += [f"{name}: {value}" for name, value in {**headers, "Content-Type": "text/plain"}.items()]
    with socket.create_connection((keyed.base_url.host, keyed.base_url.port), timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        time.sleep(0.05)  # the answer is there before the first byte of the body
        for _ in range(size >> 16):
            client.sendall(bytes(1 << 16))
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer.split()[1] in (b"401", b"415")
    assert answer.endswith(b"}")


def test_a_body_that_never_comes_holds_no_connection(keyed):
    with socket.create_connection((keyed.base_url.host, keyed.base_url.port), timeout=60) as client:
        client.sendall(b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n")
        begin = time.monotonic()
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    assert answer.split()[1] == b"401"
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "a", "metadata": [1e400]}', "1e400 is too large"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100000, "nested too deeply"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": [1, true]}', "prompt"),
        (b'{"prompt": [99999]}', "99999"),
        (b'{"prompt": "a", "n": 1000}', "n is 1000"),
        (b'{"prompt": "a", "stop": [1]}', "stop"),
        (b'{"prompt": "a", "n_predict": 1e99}', "n_predict"),
        (b'{"prompt": "a", "grammar": "root ::= ("}', "grammar"),
        (b'{"prompt": "a", "json_schema": {"type": "hiccup"}}', "schema"),
        (b'{"prompt": "a", "logit_bias": [[1]]}', "logit_bias"),
    ],
)
def test_a_body_that_makes_no_sense_is_one_clear_line(http, body, message):
    answer = http.post("/completion", content=body, headers={"Content-Type": "application/json"})
    assert is_error(answer, 400, "invalid_request_error")
    assert message in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]


def test_more_texts_than_the_queue_holds_are_told_to_come_back(keyed):
    body = {"prompt": "Once", "n_predict": 400, "ignore_eos": True}

    def post(_):
        return keyed.post("/completion", json=body, headers=WITH_KEY)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(8)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(
        answer.headers["retry-after"].isdigit() and is_error(answer, 503, "unavailable_error") for answer in refused
    )
    assert keyed.post("/completion", json={**body, "n": 4, "n_predict": 1}, headers=WITH_KEY).status_code == 503
    assert post(0).status_code == 200


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
@pytest.mark.parametrize("wrong", [{"stream": 5}, {"stream": True, "sse_ping_interval": "x"}])
def test_a_request_that_is_refused_holds_no_place_in_the_queue(keyed, path, wrong):
    body = {"prompt": "Once", "max_tokens": 1}
    for _ in range(4):  # the queue has 3
        assert keyed.post(path, json={**body, **wrong}, headers=WITH_KEY).status_code == 400
    assert keyed.post(path, json=body, headers=WITH_KEY).status_code == 200


def test_a_connection_that_sends_half_a_request_holds_up_nobody(server, http):
    with socket.create_connection(("127.0.0.1", server.port)) as half:
        half.sendall(b"POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        half.sendall(b"Content-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert http.post("/completion", json={"prompt": "Once", "n_predict": 1}).status_code == 200
        assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "options, message",
    [
        ({"api_keys": ("",)}, "API key"),
        ({"api_keys": ("a b",)}, "API key"),
        ({"cors_origins": ("example.org",)}, "origin"),
        ({"cors_origins": ("https://example.org/",)}, "origin"),
        ({"host": ""}, "host"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        ServerOptions(**options)
