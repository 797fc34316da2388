"""`fiddler batch`: the lines of its input, its results, and its continuation after any interruption."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fiddler
from fiddler import Sampling
from fiddler.errors import RequestError, ResourceError
from fiddler.generation.request import Request
from fiddler.loading import DEMO_MODEL
from fiddler.serving.batch_results import Results
from oracles import synthetic
from oracles.chat_templates import MIXTRAL_OLD
from oracles.job_file import job_file
from tools import kill_batch

CLI = [sys.executable, "-m", "fiddler", "batch"]
PATIENCE = 300


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


@pytest.mark.parametrize("written", [True, False])
def test_ctrl_c_beside_a_write_counts_what_the_file_has(tmp_path, out, monkeypatch, written):
    write = os.write

    def interrupted(file, line):
        if written:
            write(file, line)
        signal.raise_signal(signal.SIGINT)

    with Results(out, tmp_path / "in.jsonl", [1, 2]) as results:
        answer(results, 1)
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer(results, 2)
        assert results.done == ({1, 2} if written else {1})
        assert len(out.read_text(encoding="utf-8").split("\n")) - 1 == len(results.done)


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


def test_a_batch_says_once_that_system_messages_went_into_the_users(tmp_path):
    model = synthetic.with_template(DEMO_MODEL, tmp_path / "model.gguf", MIXTRAL_OLD)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a cat"}]
    file = job_file(tmp_path, *({"id": name, "messages": messages, "max_tokens": 1} for name in "ab"))
    done = batch(file.path, tmp_path / "out.jsonl", "-m", model)
    assert done.returncode == 0
    assert done.stderr.count(b"it stands before the first user message instead") == 1
