"""`fiddler batch`: the lines of its input, its results, and its continuation after any interruption."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest

import fiddler
from fiddler import Sampling
from fiddler.errors import RequestError, ResourceError
from fiddler.generation.request import Request
from fiddler.loading import DEMO_MODEL
from fiddler.sampling.constraint import Constraint
from fiddler.serving.batch_input import JobFile
from fiddler.serving.batch_results import Results
from oracles import synthetic
from tools import kill_batch

DEFAULTS = Request("", Sampling(temperature=0.5, seed=1), 7, ("end",), ignore_eos=True)
CLI = [sys.executable, "-m", "fiddler", "batch"]
PATIENCE = 300


def job_file(tmp_path, *lines, defaults=DEFAULTS):
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return JobFile(path, defaults)


def test_the_fields_of_a_line_replace_the_defaults(tmp_path):
    file = job_file(
        tmp_path,
        b'\xef\xbb\xbf{"id": 1, "prompt": "a", "top_k": null}',
        b"  ",
        {"id": "1", "prompt": "b", "max_tokens": 0, "stop": "x", "ignore_eos": False, "temperature": 0, "seed": 9},
        {"id": 2.5, "prompt": "\ud800", "max_tokens": -1, "stop": ["y", "z"], "top_k": 3, "seed": -1},
    )
    first, second, third = (job for _, job in file.jobs(set()))
    assert [first.id, second.id, third.id] == [1, "1", 2.5]
    assert first.request == replace(DEFAULTS, prompt="a", sampling=first.request.sampling)
    assert (first.request.sampling.temperature, first.request.sampling.top_k) == (0.5, 40)
    assert second.request == Request("b", Sampling(temperature=0, seed=9), 0, ("x",), ignore_eos=False)
    assert (third.request.max_tokens, third.request.stop) == (None, ("y", "z"))
    assert (third.request.sampling.top_k, third.request.sampling.seed) == (3, None)
    assert [identity for identity, _ in file.jobs({1, 2.5})] == ["1"]


def test_a_line_may_have_every_field_of_sampling(tmp_path):
    values = {field.name: getattr(Sampling(seed=3), field.name) for field in fields(Sampling)}
    ((_, job),) = job_file(tmp_path, {"id": 1, "prompt": "a"} | values).jobs(set())
    assert job.request.sampling == Sampling(seed=3)


def test_the_seed_of_a_line_depends_on_its_id_and_the_default_seed_only(tmp_path):
    def seeds(seed, *ids):
        file = job_file(tmp_path, *({"id": n, "prompt": "a"} for n in ids), defaults=Request("", Sampling(seed=seed)))
        return {identity: job.request.sampling.seed for identity, job in file.jobs(set())}

    first, second = seeds(1, 1, 2, "1", "2"), seeds(1, "2", 3, 1)
    assert len(set(first.values())) == 4
    assert (first[1], first["2"]) == (second[1], second["2"])
    assert not set(seeds(2, 1, 2, "1", "2").values()) & set(first.values())
    assert seeds(None, 1, 2) == {1: None, 2: None}


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not UTF-8"),
        (b"[1]", "is a list"),
        (b"NaN", "NaN is no JSON number"),
        (b"[" * 200000, "nested too deeply"),
        (b'{"id": 1, "prompt": ' + b'{"a":' * 200000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b', "prompt": "a"}', "is not JSON"),
        ({"prompt": "a"}, "has no id"),
        ({"id": None, "prompt": "a"}, "has no id"),
        ({"id": True, "prompt": "a"}, "the id is True"),
        ({"id": [1], "prompt": "a"}, r"the id is \[1\]"),
        (b'{"id": 1e999, "prompt": "a"}', "the id is inf"),
        ({"id": "\udc80", "prompt": "a"}, "no text that UTF-8 can hold"),
        ({"id": 7, "prompt": "a"}, "the id 7 is that of line 1"),
        ({"id": 7.0, "prompt": "a"}, "the id 7.0 is that of line 1"),
        ({"id": 1}, "either a prompt or messages"),
        ({"id": 1, "prompt": "a", "messages": []}, "either a prompt or messages"),
        ({"id": 1, "prompt": 5}, "the prompt is 5"),
        ({"id": 1, "prompt": "a", "top_q": 5}, "unknown field 'top_q'; known are id, prompt"),
        ({"id": 1, "prompt": "a", "max_tokens": -2}, "max_tokens is -2"),
        ({"id": 1, "prompt": "a", "max_tokens": 1.5}, "max_tokens is 1.5"),
        ({"id": 1, "prompt": "a", "max_tokens": True}, "max_tokens is True"),
        ({"id": 1, "prompt": "a", "stop": ""}, "stop is ''"),
        ({"id": 1, "prompt": "a", "stop": [1]}, r"stop is \[1\]"),
        ({"id": 1, "prompt": "a", "ignore_eos": 1}, "ignore_eos is 1"),
        ({"id": 1, "prompt": "a", "temperature": -1}, "temperature is -1"),
        ({"id": 1, "prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"id": 1, "prompt": "a", "temperature": 10**400}, "too large"),
        ({"id": 1, "prompt": "a", "top_k": True}, "top_k is true"),
        ({"id": 1, "prompt": "a", "seed": -2}, "seed is -2"),
        ({"id": 1, "messages": [{"role": "user"}]}, "a role and a content"),
        ({"id": 1, "messages": "hello"}, "messages are 'hello'"),
        ({"id": 1, "messages": [{"role": "user", "content": 1}]}, "it must be a string"),
        ({"id": 1, "prompt": "a", "logit_bias": {"the": 1}}, "logit_bias is for 'the'"),
        ({"id": 1, "prompt": "a", "logit_bias": [5]}, "logit_bias is"),
    ],
)
def test_a_bad_line_fails_alone_with_its_id_or_number(tmp_path, line, message):
    good = {"id": 7, "prompt": "a"}
    file = job_file(tmp_path, good, line, {"id": 8, "prompt": "b"})
    (_, first), (identity, error), (_, last) = file.jobs(set())
    assert [job.request.prompt for job in (first, last)] == ["a", "b"]
    has_id = isinstance(line, dict) and line.get("id") == 1 and line["id"] is not True
    assert identity == (1 if has_id else "line 2")
    assert re.search(message, str(error))
    assert len(str(error)) < 500
    assert list(file.ids) == [7, identity, 8]
    assert [i for i, _ in file.jobs({identity})] == [7, 8]
    if "is that of line 1" not in message:
        with pytest.raises(RequestError, match=rf"in\.jsonl, line 1: .*{message}"):
            job_file(tmp_path, line)


def test_lines_of_openais_batches_are_read(tmp_path):
    chat = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stream": False}
    options = {"max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "stop": "x", "seed": 3, "n": 1}
    wrapped = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}}
    lines = [
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat | options},
        {"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "Once", "logprobs": 4, "max_tokens": 2}},
        {"custom_id": "c", "body": chat | {"logprobs": True, "top_logprobs": 2, "response_format": wrapped}},
        {"custom_id": "d", "body": chat | {"response_format": {"type": "text"}, "user": "me"}},
        {"custom_id": "e", "body": chat | {"n": 2}},
        {"custom_id": "f", "body": chat | {"tools": []}},
        {"custom_id": "g", "url": "/v1/embeddings", "body": chat},
        {"custom_id": "h", "body": 1},
        {"custom_id": "i", "body": chat | {"response_format": {"type": "xml"}}},
    ]
    a, b, c, d, *errors = (entry for _, entry in job_file(tmp_path, *lines).jobs(set()))
    assert [job.id for job in (a, b, c, d)] == ["a", "b", "c", "d"]
    sampling = Sampling(temperature=0, top_p=0.5, seed=3)
    assert a.request == Request("", sampling, 5, ("x",), ignore_eos=True)
    assert a.messages == ({"role": "user", "content": "Hi"},)
    assert (b.request.prompt, b.request.sampling.n_probs, b.request.max_tokens) == ("Once", 4, 2)
    assert c.request.sampling.n_probs == 2
    assert c.request.constraint == Constraint.json_schema({"type": "array"})
    assert d.request.constraint is None
    for error, words in zip(
        errors, ("n is 2", "'tools'", "/v1/embeddings", "body is 1", "response_format"), strict=True
    ):
        assert words in str(error)


def test_the_messages_of_a_line_are_its_prompt(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    ((_, job),) = job_file(tmp_path, {"id": 1, "messages": messages}).jobs(set())
    assert list(job.messages) == messages


def test_a_file_that_cannot_be_read_or_holds_no_prompt_is_refused(tmp_path):
    for path, message in ((tmp_path / "none", "No such file"), (tmp_path, "it is a folder")):
        with pytest.raises(RequestError, match=message):
            JobFile(path, DEFAULTS)
    with pytest.raises(RequestError, match="holds no prompt"):
        job_file(tmp_path, b"", b" ")


def test_a_file_that_changes_while_its_jobs_run_is_an_error(tmp_path):
    file = job_file(tmp_path, {"id": 1, "prompt": "a"}, {"id": 2, "prompt": "b"})
    file.path.write_text('{"id": 1, "prompt": "a"}\n{"id": 3, "prompt": "c"}\n')
    with pytest.raises(RequestError, match="line 2: was changed"):
        list(file.jobs(set()))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def answer(results, identity):
    results.add(identity, text="ü\u2028\n", finish_reason="stop", prompt_tokens=1, generated_tokens=2)


def test_a_last_result_cut_anywhere_is_removed_and_written_again(tmp_path, out):
    source = tmp_path / "in.jsonl"
    with Results(out, source, [1, "b", 3]) as results:
        answer(results, 1)
        results.add("b", error="too long")
        complete = out.read_bytes()
        answer(results, 3)
    whole = out.read_bytes()
    assert len(whole.split(b"\n")) == 4
    for cut in range(len(complete), len(whole)):
        out.write_bytes(whole[:cut])
        with Results(out, source, [1, "b", 3]) as results:
            assert results.done == {1, "b"}
            answer(results, 3)
        assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "text, message",
    [
        ("my notes", "line 1: is not the beginning of a result"),
        ("my notes\n", "line 1: is not the beginning of a result"),
        ("\n", "line 1: is not the beginning of a result"),
        ("{my notes}\n", "line 1: is not JSON"),
        ('{"id": 1, "prompt": "a"}\n', "line 1: is no result"),
        ('{"id": 1, "error": "x"}\n{"id": 1, "error": "x"}\n', "line 2: answers 1 again"),
        ('{"id": 8, "error": "x"}\n', "line 1: answers 8, which is not among"),
        ('{"a":' * 200000 + "\n", "line 1: is nested too deeply"),
    ],
)
def test_a_file_that_holds_no_results_of_these_prompts_is_refused_and_left_as_it_is(tmp_path, out, text, message):
    out.write_text(text)
    with pytest.raises(RequestError, match=message):
        Results(out, tmp_path / "in.jsonl", [1, 2])
    assert out.read_text() == text


def test_a_line_longer_than_the_limit_is_refused_with_its_number(tmp_path, out):
    longest = {"id": 1, "prompt": ""}
    longest["prompt"] = "a" * (2**24 - 1 - len(json.dumps(longest)))
    assert list(job_file(tmp_path, longest).ids) == [1]
    longest["prompt"] += "a"
    with pytest.raises(RequestError, match=r"in\.jsonl, line 2: is longer than 16 MiB"):
        job_file(tmp_path, {"id": 0, "prompt": "a"}, longest)
    out.write_text('{"id": 1, "error": "x"}\n{"id": 2, "error": "')
    os.truncate(out, 64 << 30)
    with pytest.raises(RequestError, match="line 2: is longer than 256 MiB"):
        Results(out, tmp_path / "none", [1, 2])
    assert out.stat().st_size == 64 << 30


def test_results_cannot_go_to_the_prompts_a_special_file_or_a_file_in_use(tmp_path, out):
    source = tmp_path / "in.jsonl"
    source.write_text("prompts")
    link = tmp_path / "link"
    link.hardlink_to(source)
    for path, message in (
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "out", "No such file"),
        (source, "is the file of prompts"),
        (link, "is the file of prompts"),
    ):
        with pytest.raises(RequestError, match=message):
            Results(path, source, [1])
    assert source.read_text() == "prompts"
    with Results(out, source, [1]), pytest.raises(RequestError, match="another process is writing it"):
        Results(out, source, [1])
    with Results(out, source, [1]) as results:
        assert not results.done


def test_results_are_written_straight_through_a_pipe_and_to_the_null_device(tmp_path):
    source = tmp_path / "in.jsonl"
    for _ in range(2):  # nothing to resume from
        with Results(Path("/dev/null"), source, [1]) as results:
            answer(results, 1)
            assert results.done == {1}
    reading, writing = os.pipe()
    with Results(Path(f"/dev/fd/{writing}"), source, [1, 2]) as results:
        answer(results, 1)
        answer(results, 2)
    os.close(writing)
    with open(reading, "rb") as lines:  # noqa: PTH123  # a descriptor
        assert [json.loads(line)["id"] for line in lines] == [1, 2]
    with Results(Path("/dev/full"), source, [1]) as results, pytest.raises(ResourceError, match="/dev/full: cannot be"):
        answer(results, 1)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RequestError, match="fifo: is a pipe that nobody reads"):
        Results(tmp_path / "fifo", source, [1])


def test_a_full_disk_leaves_whole_result_lines(tmp_path, out):
    source = tmp_path / "in.jsonl"
    with Results(out, source, [1, 2]) as results:
        answer(results, 1)
        before, limits = out.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))  # ten bytes are written, then no more
        try:
            with pytest.raises(ResourceError, match="make room"):
                answer(results, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert out.read_bytes() == before
        assert results.done == {1}


def batch(*arguments):
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, timeout=PATIENCE, check=False)


def test_the_command_answers_each_prompt_as_generate_does_and_once_only(tmp_path, out):
    prompts = ["Once upon a time", "A cat", "word " * 200, "The ünicorn"]
    lines = [{"id": n, "prompt": text} for n, text in enumerate(prompts)] + [{"id": "own", "prompt": "One", "seed": 5}]
    file = job_file(tmp_path, *lines, defaults=Request("", Sampling(seed=3)))
    options = ["-n", 9, "--seed", 3, "-np", 2, "-c", 100, "--precision", "exact", "--device", "cpu"]
    done = batch(file.path, out, *options)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"5 results (errors: 1), 0 were there" in done.stderr
    results = {line["id"]: line for line in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    engine = fiddler.load(precision="exact", device="cpu", context=100)
    for _, job in file.jobs(set()):
        if job.id == 2:
            assert "exceed the context of 100" in results[2]["error"]
            continue
        alone = engine.generate(job.request.prompt, job.request.sampling, 9)
        assert results[job.id] == {
            "id": job.id,
            "text": alone.text,
            "finish_reason": alone.finish_reason,
            "prompt_tokens": alone.stats.prompt_tokens,
            "generated_tokens": len(alone.tokens),
        }
    assert len(results) == 5
    before = out.read_bytes()
    again = batch(file.path, out, "-m", tmp_path / "never-opened.gguf")
    assert (again.returncode, out.read_bytes()) == (0, before)
    assert b"has all 5 results" in again.stderr


def test_bad_input_is_refused_before_any_model_is_opened(tmp_path, out):
    file = job_file(tmp_path, *({"id": n, "prompt": "a"} for n in range(10000)))
    file.path.write_text('{"id": 1}\n' * 10000)
    unopened_model = ["-m", tmp_path / "never-opened.gguf"]
    done = batch(file.path, out, *unopened_model)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"line 1: give either a prompt or messages" in done.stderr
    assert not out.exists()
    for options in (["--temp", "-1"], ["--stop", ""], ["-np", 0], ["--top-p", 2]):
        assert batch(file.path, out, *unopened_model, *options).returncode == 2


def test_an_interrupted_batch_leaves_whole_result_lines(tmp_path, out):
    file = job_file(tmp_path, *({"id": n, "prompt": "Once upon a time"} for n in range(3000)))
    with subprocess.Popen([*CLI, file.path, out, "-n", "9"], stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + PATIENCE
        while not (out.exists() and out.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        message = process.communicate(timeout=PATIENCE)[1].decode()
    assert process.returncode == 130
    assert out.read_bytes().endswith(b"}\n")
    count = len(out.read_text(encoding="utf-8").splitlines())
    assert f"interrupted: {count} of 3000 are in {out}" in message
    assert "Traceback" not in message


def test_a_batch_that_is_killed_and_started_again_loses_and_repeats_no_result(tmp_path):
    """Killed at three random moments; `tools/kill_batch.py` does so at any number."""
    killed, undisturbed = kill_batch.kill_often(tmp_path, moments=3, prompts_each=15, seed=1)
    order = {"key": lambda line: line["id"]}
    assert sorted(killed, **order) == sorted(undisturbed, **order)
    assert [line["id"] for line in sorted(undisturbed, **order)] == list(range(45))


def test_messages_of_a_batch_are_answered_by_the_models_template(tmp_path):
    """As in a chat; without a template, or where it refuses them, the line's result says so."""
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[story]"
    model = synthetic.with_template(DEMO_MODEL, tmp_path / "model.gguf", template)
    file = job_file(
        tmp_path,
        {"id": 1, "messages": [{"role": "user", "content": "a cat"}], "n_probs": 2},
        {"id": 2, "prompt": "[user] a cat\n[story]", "logit_bias": {"2": -1}},
    )
    options = ["-n", "12", "--temp", "0", "--precision", "exact"]
    out = tmp_path / "out.jsonl"
    assert batch(file.path, out, "-m", model, *options).returncode == 0
    results = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    chat = fiddler.Chat(
        fiddler.load(model, device="cpu", precision="exact"), None, fiddler.Sampling(temperature=0.0), 12
    )
    assert results[1]["text"] == "".join(chat.send("a cat"))
    assert [len(step["top_logprobs"]) for step in results[1]["log_probs"]] == [2] * results[1]["generated_tokens"]
    out.unlink()
    assert batch(file.path, out, *options).returncode == 0
    results = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert "no chat template" in results[1]["error"]
    assert results[2]["text"]
