"""The server's own protocol: streams, clients that leave, llama.cpp's routes, metrics, experts, start and end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from gguf import GGUFReader
from prometheus_client.parser import text_string_to_metric_families

import fiddler
from fiddler.errors import RequestError
from fiddler.loading import DEMO_MODEL
from fiddler.serving.http.errors import HttpError
from fiddler.serving.http.sse import EventStream
from tools.server_process import ServerProcess

ENDLESS = {"prompt": "Once upon a time", "n_predict": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu")


def events_of(lines):
    """The JSON of the data lines of a stream, up to [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line[6:])


def request_of(body):
    """The bytes of a request to /completion."""
    head = ["POST /completion HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def metric(http, name, **labels):
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    raise AssertionError(f"no metric {name}")


def idle(http):
    """Wait until nothing is computed."""
    deadline = time.monotonic() + 60
    while metric(http, "llamacpp:requests_processing") + metric(http, "llamacpp:requests_deferred"):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)


def test_a_completion_is_what_the_engine_generates(http, engine):
    """Greedy, seeded, with every option of sampling, from text and from ids."""
    ids = engine.tokenizer.encode("The cat sat", add_bos=True)
    for options in (
        {"temperature": 0},
        {"temperature": 1.2, "seed": 7, "top_k": 0, "top_p": 0.9, "min_p": 0, "typical_p": 0.95},
        {"temperature": 0.7, "seed": 8, "repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1},
        {"seed": 9, "dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    ):
        expected = engine.generate(ids, fiddler.Sampling(**options), max_tokens=20, reuse=False)
        for prompt in ("The cat sat", ids):
            body = {"prompt": prompt, "n_predict": 20, "cache_prompt": False, "return_tokens": True, **options}
            result = http.post("/completion", json=body).json()
            assert (result["content"], tuple(result["tokens"])) == (expected.text, expected.tokens)


def test_a_stream_is_made_of_events_and_ends_with_done(http):
    body = {"prompt": "Once upon a time", "max_tokens": 5, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = answer.read().decode()
    assert all(event.startswith("data: ") for event in text.strip().split("\n\n"))
    assert text.endswith("data: [DONE]\n\n")


def test_the_cache_counts_and_the_times_are_llama_cpp_s(http):
    prompt = "It was a very cold day, and the little bird looked for a warm place."
    first = http.post("/completion", json={"prompt": prompt, "n_predict": 4}).json()["timings"]
    second = http.post("/completion", json={"prompt": prompt, "n_predict": 4}).json()["timings"]
    assert first["prompt_n"] + first["cache_n"] == second["prompt_n"] + second["cache_n"]
    assert second["prompt_n"] == 1
    assert second["predicted_n"] == 4
    assert 0 < second["predicted_ms"] / 3 == pytest.approx(second["predicted_per_token_ms"])
    body = {"prompt": prompt, "n_predict": 4, "cache_prompt": False}
    assert http.post("/completion", json=body).json()["timings"]["cache_n"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_computing_within_a_step(server, http, stream):
    """Also without a stream: the metrics stop counting once the connection is closed."""
    idle(http)
    cancelled = metric(http, "fiddler_texts_total", end="cancelled")
    body = json.dumps({**ENDLESS, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_of(body))
        before = metric(http, "llamacpp:tokens_predicted_total")
        while metric(http, "llamacpp:tokens_predicted_total") < before + 5:
            time.sleep(0.02)
    deadline = time.monotonic() + 5
    while metric(http, "llamacpp:requests_processing"):
        assert time.monotonic() < deadline
    assert metric(http, "fiddler_texts_total", end="cancelled") == cancelled + 1
    after = metric(http, "llamacpp:tokens_predicted_total")
    time.sleep(0.3)
    assert metric(http, "llamacpp:tokens_predicted_total") == after < before + 900


def test_a_client_that_reads_nothing_holds_up_nobody(server, http):
    body = json.dumps({**ENDLESS, "n_probs": 100, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request_of(body))
        time.sleep(0.5)
        for _ in range(3):
            assert http.post("/completion", json={"prompt": "Once", "n_predict": 3}).status_code == 200
    idle(http)


def test_a_long_prompt_is_told_as_it_is_read(http):
    body = {"prompt": "The cat sat. " * 150, "n_predict": 2, "stream": True}
    body |= {"return_progress": True, "cache_prompt": False}
    with http.stream("POST", "/completion", json=body) as answer:
        progress = [event["prompt_progress"] for event in events_of(answer.iter_lines()) if "prompt_progress" in event]
    assert progress[0]["processed"] == progress[0]["cache"] == 0
    assert progress[-1]["processed"] == progress[-1]["total"] > 512
    assert [step["processed"] for step in progress] == sorted({step["processed"] for step in progress})


def test_a_stream_that_is_silent_sends_comments_and_one_that_fails_at_once_is_no_stream():
    """The response by itself, with events that take their time."""

    async def slow():
        await asyncio.sleep(0.35)
        yield b"data: 1\n\n"
        raise fiddler.FiddlerError("it failed")

    async def failing():
        raise RequestError("no such thing")
        yield b""

    async def run(events):
        sent, closed, forever = [], [], asyncio.Event()

        async def receive():
            await forever.wait()

        async def send(message):
            sent.append(message)

        stream = EventStream(events, lambda: closed.append(True), ping=0.1, timeout=60)
        try:
            await stream({"type": "http"}, receive, send)
        finally:
            assert closed == [True]
        return sent

    start, *bodies = asyncio.run(run(slow()))
    assert start["status"] == 200
    pings = [message["body"] for message in bodies[:-2]]
    assert set(pings) == {b": keep-alive\n\n"}
    assert len(pings) >= 2
    assert bodies[-2]["body"] == b"data: 1\n\n"
    assert json.loads(bodies[-1]["body"].removeprefix(b"data: "))["error"]["message"] == "it failed"
    assert [message["more_body"] for message in bodies] == [True] * (len(bodies) - 1) + [False]
    with pytest.raises(HttpError, match="no such thing"):
        asyncio.run(run(failing()))


def test_tokens_and_text_are_the_tokenizer_s(http, engine):
    text = "A cat \u732b and \U0001f431."
    ids = engine.tokenizer.encode(text)
    assert http.post("/tokenize", json={"content": text}).json() == {"tokens": ids}
    with_bos = http.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]
    assert with_bos == engine.tokenizer.encode(text, add_bos=True)
    pieces = http.post("/tokenize", json={"content": text, "with_pieces": True}).json()["tokens"]
    joined = b"".join(bytes(p["piece"]) if isinstance(p["piece"], list) else p["piece"].encode() for p in pieces)
    assert joined == b" " + text.encode()
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"content": text}
    assert http.post("/tokenize", json={"content": "</s>"}).json()["tokens"] != [2]
    assert http.post("/tokenize", json={"content": "</s>", "parse_special": True}).json()["tokens"] == [2]


def test_the_template_renders_messages_tools_and_the_beginning_of_an_answer(http):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]}]
    user = "<|im_start|>user\nHi\nthere<|im_end|>\n"
    rendered = http.post("/apply-template", json={"messages": messages}).json()["prompt"]
    assert rendered == user + "<|im_start|>assistant\n"
    begun = [*messages, {"role": "assistant", "content": "Well"}]
    assert http.post("/apply-template", json={"messages": begun}).json()["prompt"] == rendered + "Well"
    options = {"add_generation_prompt": False}
    assert http.post("/apply-template", json={"messages": messages, **options}).json()["prompt"] == user
    options = {"chat_template_kwargs": {"enable_thinking": True}}
    assert http.post("/apply-template", json={"messages": messages, **options}).json()["prompt"].endswith("<think>\n")
    body = {"messages": begun, "max_tokens": 4, "verbose": True}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert answer["__verbose"]["prompt"].endswith("assistant\nWell")
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert http.post("/v1/chat/completions", json={**body, **both}).status_code == 400


def test_reasoning_that_the_prompt_has_opened_is_told_apart(http):
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "chat_template_kwargs": {"enable_thinking": True},
        "grammar": 'root ::= "Hm. It is so." "\\n</think>\\n\\n" "Yes."',
    }
    message = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm. It is so.", "Yes.")
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        deltas = [event["choices"][0]["delta"] for event in events_of(answer.iter_lines())]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm. It is so."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Yes."
    whole = http.post("/v1/chat/completions", json={**body, "reasoning_format": "none"}).json()
    assert whole["choices"][0]["message"]["content"] == "Hm. It is so.\n</think>\n\nYes."


def test_properties_slots_and_models_name_the_model(http):
    properties = http.get("/props").json()
    assert properties["model_path"] == DEMO_MODEL.name
    assert properties["total_slots"] == len(http.get("/slots").json()) == 8
    assert properties["default_generation_settings"]["params"]["temperature"] == 0.8
    models = http.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [model["slug"] for model in models["models"]] == ["demo"]
    lengths = [key for key in GGUFReader(DEMO_MODEL).fields if key.endswith(".embedding_length")]
    assert models["data"][0]["meta"]["n_embd"] == GGUFReader(DEMO_MODEL).fields[lengths[0]].contents()


def test_metrics_count_what_was_asked_for(http):
    idle(http)
    names = ("prompt_tokens", "prompt_tokens_cached", "tokens_predicted", "n_decode")
    before = {name: metric(http, f"llamacpp:{name}_total") for name in names}
    choices = metric(http, "fiddler_expert_choices_total", device="cpu")
    timings = http.post("/completion", json={"prompt": "A story of a fox", "n_predict": 6}).json()["timings"]
    gained = {name: metric(http, f"llamacpp:{name}_total") - before[name] for name in names}
    assert gained["prompt_tokens"] == timings["prompt_n"]
    assert gained["prompt_tokens_cached"] == timings["cache_n"]
    assert gained["tokens_predicted"] == 6 == gained["n_decode"]
    # 8 layers, 2 experts a token; of a prompt the last layer computes the last token only
    computed = timings["prompt_n"] + 5
    assert metric(http, "fiddler_expert_choices_total", device="cpu") - choices == 2 * (7 * computed + 6)
    assert metric(http, "fiddler_weights_read_bytes_total", work="experts", device="cpu") > 0


def test_the_experts_view_tells_shape_and_counts_as_they_grow(http):
    shape = http.get("/experts").json()
    assert [shape[name] for name in ("layers", "first", "experts", "used", "device")] == [8, 0, 8, 2, "cpu"]
    assert [len(row) for row in shape["counts"]] == [8] * 8
    with http.stream("GET", "/experts/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = events_of(answer.iter_lines())
        first = next(events)
        assert first["counts"] == shape["counts"]
        http.post("/completion", json={"prompt": "Once", "n_predict": 5})
        second = next(events)
        while second["generated_tokens"] < first["generated_tokens"] + 5:
            second = next(events)
    grown = sum(map(sum, second["counts"])) - sum(map(sum, first["counts"]))
    assert grown > 5 * 8 * 2 - 2 * 8


def test_a_server_without_a_template_or_key_says_where_it_is_and_ends_within_seconds_of_sigterm():
    """In the middle of streams: each ends with an error as its last event, and its connection properly."""
    with ServerProcess("-np", "4") as process:
        assert re.fullmatch(r"stories-18m\.gguf at http://127\.0\.0\.1:\d+\n", process.line)
        with httpx.Client(base_url=process.url, timeout=60) as http:
            body = {"messages": [{"role": "user", "content": "Once"}], "n": 2, "max_tokens": 8}
            assert len(http.post("/v1/chat/completions", json=body).json()["choices"]) == 2
            tool = {"type": "function", "function": {"name": "f"}}
            assert http.post("/v1/chat/completions", json={**body, "tools": [tool]}).status_code == 400
            endings: list[list[str]] = []

            def read():
                with httpx.stream("POST", f"{process.url}/completion", json={**ENDLESS, "stream": True}) as answer:
                    endings.append([line for line in answer.iter_lines() if line])

            threads = [threading.Thread(target=read) for _ in range(8)]
            for thread in threads:
                thread.start()
            while metric(http, "llamacpp:requests_processing") < 2:
                time.sleep(0.05)
            began = time.monotonic()
            assert process.stop(signal.SIGTERM) == 0
            assert time.monotonic() - began < 5
            for thread in threads:
                thread.join(10)
        assert len(endings) == 8  # no connection broke off
        for lines in endings:
            last = json.loads(lines[-1].removeprefix("data: ")) if lines[-1] != "data: [DONE]" else None
            assert last is None or last["error"]["code"] == 503
        assert any(lines[-1] != "data: [DONE]" for lines in endings)
        assert process.errors == ""


def serve(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fiddler", "serve", *arguments], capture_output=True, text=True, timeout=120
    )


def test_a_port_that_is_taken_is_one_line(server):
    done = serve("--port", str(server.port))
    assert done.returncode == 1
    assert re.fullmatch(r"error: cannot listen on 127\.0\.0\.1, port \d+: .*\n", done.stderr)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--api-key", "a b"], "API key"),
        (["--cors-origin", "example.org"], "origin"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--host", "a" * 70], "is no name of a machine"),
        (["--host", "a..b"], "is no name of a machine"),
        (["--port", "99999"], "99999"),
    ],
)
def test_options_that_make_no_sense_end_in_a_line(arguments, message):
    done = serve(*arguments)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert not re.search("Traceback|internal", done.stderr)


def test_without_its_packages_the_command_says_what_to_install(tmp_path):
    (tmp_path / "uvicorn.py").write_text("raise ImportError(name='uvicorn')")
    done = subprocess.run(
        [sys.executable, "-c", "from fiddler.__main__ import main; main()", "serve"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": ":".join([str(tmp_path), *sys.path])},
    )
    assert done.stderr == "error: fiddler serve needs uvicorn: pip install 'fiddler-moe[serve]'\n"
    assert done.returncode == 1
