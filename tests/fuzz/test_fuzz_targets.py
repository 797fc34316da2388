"""The fuzzer's targets take their own seeds, and inputs that were findings once; a read behind a tensor is a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fuzz.draw import Draw, changed_json
from fuzz.http_target import Exchange, checked, scope_of, server
from fuzz.parts import parts_target
from fuzz.targets import TARGETS

REFUSED = {  # of each target one seed at least is read, and one input is refused
    "gguf": b"GGUF\3\0\0\0",
    "checkpoint": bytes(40),
    "tokenizer-json": b"{",
    "tokenizer-model": b"\x0a\xff",
    "jobs": b"[]",
    "prompt-cache": bytes(40),
    "body": bytes(40),
    "template": bytes(4),
    "schema": b"\0\0\0\1",
    "grammar": b"\0\1\0\1",
    "http": b"\1\1\0\0\0\0\0\1",
}
READ = {"gguf", "tokenizer-json", "tokenizer-model", "jobs", "template", "schema", "grammar", "http"}


@pytest.fixture(scope="module", autouse=True)
def ended():
    """Ends the server of the HTTP target, which otherwise lives as long as the process."""
    yield
    if server.cache_info().currsize:
        server().close()
        server.cache_clear()


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_or_refused(name, tmp_path):
    results = [TARGETS[name].run(seed, tmp_path) for seed in TARGETS[name].seeds()]
    assert name not in READ or None in results
    assert TARGETS[name].run(REFUSED[name], tmp_path)


def test_models_that_open_compute_beside_inaccessible_pages(tmp_path):
    target = parts_target(["avx2"])
    assert [target.run(seed, tmp_path) for seed in target.seeds()[:4]] == [None] * 4


def test_a_read_behind_a_tensor_ends_the_process():
    code = (
        "import ctypes, numpy as np\n"
        "from fuzz.guarded_pages import guarded\n"
        "copy = guarded(np.arange(7, dtype=np.uint16))\n"
        "assert copy.tolist() == list(range(7))\n"
        "print('read', flush=True)\n"
        "ctypes.string_at(copy.ctypes.data, copy.nbytes + 1)\n"
    )
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-11, "read\n")


def test_the_same_bytes_make_the_same_changes():
    def changed(data):
        return changed_json(Draw(data), {"a": [1, {"b": None}], "c": "d"}, ("e",))

    data = bytes(range(7, 90))
    assert repr(changed(data)) == repr(changed(data)) != repr(changed(data[3:]))


def test_a_fuzzed_request_is_answered_as_over_a_socket():
    body = b'{"prompt": "Once upon a time", "n_predict": 3, "temperature": 0, "cache_prompt": false}'
    scope = scope_of(Draw(b""), "/completion", "POST", len(body))
    whole, parted, gone = Exchange([body]), Exchange([body[:9], body[9:]]), Exchange([body], leaves=0)
    for exchange in (whole, parted, gone):
        server().call(scope, exchange)
    assert json.loads(whole.body)["content"] == json.loads(parted.body)["content"] != ""
    assert json.loads(whole.body)["tokens_predicted"] == 3
    end = time.monotonic() + 60
    while server().service.worker.running and time.monotonic() < end:  # the worker hears of it between two steps
        time.sleep(0.01)
    assert not server().service.worker.running


def test_a_query_that_is_no_text_is_refused(tmp_path):
    finding = b"\xff\xffw\x10\xf7(1\xff\xf7"
    assert TARGETS["http"].run(finding, tmp_path) == "the query string has a byte beyond ASCII; write it as %XX"
    for path in ("/health", "/health/", "/nowhere"):
        exchange = Exchange([b""])
        server().call({**scope_of(Draw(b""), path, "GET", 0), "query_string": b"a=\xf7"}, exchange)
        assert exchange.status == 400, exchange.body


def test_an_answer_of_another_form_is_a_finding():
    exchange = Exchange([])
    exchange.sent = [{"status": 400, "headers": []}, {"body": b'{"error": {"message": "a", "type": "b", "code": 500}}'}]
    with pytest.raises(AssertionError):
        checked(exchange, "/completion", "POST")


def test_a_model_with_a_context_of_three_positions_is_read(tmp_path):
    """A finding in the target itself: it computed a fourth."""
    assert parts_target(["avx2"]).run(b"\x7f@+\x02\x02\xfb\xfb", tmp_path) is None
