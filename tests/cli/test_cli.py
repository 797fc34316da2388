"""The command line as a user meets it: real processes, their output, their exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fiddler
from fiddler import Sampling
from oracles.command import FIDDLER, PATIENCE, fails_in_one_line, run, start, wait_until
from oracles.synthetic import write_random_mixtral

TINY = Path(__file__).parents[1] / "data" / "tiny"
PROMPT = "The old fiddler lived"
GREEDY = ["--temp", "0", "--ignore-eos", "-c", "600"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("cli") / "tiny.gguf")


@pytest.fixture(scope="module")
def engine(model):
    return fiddler.load(model)


def continuation(engine, prompt, count, sampling=None, **options):
    sampling = sampling or Sampling(0.0)
    return engine.generate(prompt, sampling, count, **{"ignore_eos": True} | options).text


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["convert", "-h"]])
def test_help_imports_no_heavy_package(arguments):
    command = [sys.executable, "-X", "importtime", *FIDDLER[1:], *arguments]
    done = subprocess.run(command, capture_output=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    assert {"fiddler.cli.app", "typer"} <= loaded
    assert not loaded & {"numpy", "torch", "numba", "llvmlite", "gguf", "sentencepiece", "tqdm", "fiddler.engine"}
    assert b"Usage" in done.stdout


def test_the_installed_command_says_the_version_of_the_package():
    expected = f"fiddler {fiddler.__version__}\n".encode()
    assert run("--version").stdout == expected
    command = Path(sys.executable).with_name("fiddler")
    if not command.exists():
        pytest.skip("fiddler is importable here, but not installed")
    assert subprocess.run([command, "--version"], capture_output=True, check=True).stdout == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Usage"),
        (["play"], "play"),
        (["run", "--loud", "-p", "x"], "--loud"),
        (["run", "a.gguf", "b.gguf", "-p", "x"], "b.gguf"),
        (["run", "-p", "x", "-n", "many"], "-n"),
        (["run", "-p", "x", "-n", "-2"], "-n"),
        (["run", "-p", "x", "-c", "0"], "--ctx"),
        (["run", "-p", "x", "-t", "0"], "--threads"),
        (["run", "-p", "x", "--temp", "nan"], "temperature is nan"),
        (["run", "-p", "x", "--top-p", "2"], "top_p is 2.0"),
        (["run", "-p", "x", "--repeat-penalty", "0"], "repeat_penalty is 0.0"),
        (["run", "-p", "x", "--device", "tpu"], "--device"),
        (["run", "-p", "x", "--prompt-file", "y"], "not both"),
        (["run", "-p"], "-p"),
        (["convert"], "SOURCE"),
        (["convert", "folder", "out.gguf", "--dtype", "f32"], "--dtype"),
        (["inspect"], "MODEL.gguf"),
    ],
)
def test_wrong_usage_exits_with_code_2_and_names_the_argument(arguments, message):
    done = run(*arguments, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 2
    assert message in (done.stdout + done.stderr).decode()
    assert b"Traceback" not in done.stderr


def test_no_prompt_on_a_terminal_or_a_closed_stdin_is_wrong_usage():
    controller, terminal = pty.openpty()
    try:
        done = run("run", "never-opened.gguf", stdin=terminal)
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.returncode == 2
    assert b"no prompt" in done.stderr
    closed = subprocess.run(["sh", "-c", '"$0" -m fiddler run <&-', sys.executable], capture_output=True, check=False)
    assert closed.returncode == 2
    assert b"no prompt" in closed.stderr


def test_files_that_cannot_be_read_give_one_line_that_names_them(tmp_path, model):
    (tmp_path / "bad.gguf").write_bytes(b"no model at all")
    fails_in_one_line(run("run", tmp_path / "none.gguf", "-p", "x"), "none.gguf")
    fails_in_one_line(run("run", tmp_path / "bad.gguf", "-p", "x"), "bad.gguf")
    fails_in_one_line(run("run", tmp_path, "-p", "x"), "fiddler convert")
    fails_in_one_line(run("inspect", tmp_path / "bad.gguf"), "bad.gguf")
    fails_in_one_line(run("run", model, "--prompt-file", tmp_path / "none.txt"), "none.txt")
    fails_in_one_line(run("run", model, "--prompt-file", tmp_path), "cannot be read")


def test_a_traceback_is_shown_on_request(tmp_path):
    done = run("run", tmp_path / "none.gguf", "-p", "x", env=os.environ | {"FIDDLER_TRACEBACK": "1"})
    assert done.returncode == 1
    assert b"Traceback (most recent call last)" in done.stderr
    assert b"FileFormatError" in done.stderr


def test_the_continuation_goes_to_stdout_and_statistics_to_stderr(model, engine):
    done = run("run", model, "-p", PROMPT, "-n", 12, "--stats", *GREEDY)
    assert done.returncode == 0
    assert done.stdout.decode() == continuation(engine, PROMPT, 12) + "\n"
    stats = done.stderr.decode()
    prompt_tokens = len(engine.tokenizer.encode(PROMPT, add_bos=True))
    assert re.search(rf"prompt {prompt_tokens} tokens, [\d.]+ tokens/s \| generation 12 tokens, [\d.]+ tokens/s", stats)
    assert re.search(r"load [\d.]+ s", stats)
    assert re.search(r"[1-9]\d* MiB", stats)
    assert stats.startswith("CPU, as asked | ")
    assert stats.count("\n") == 1


def test_a_prompt_on_standard_input_loses_one_newline_at_its_end(model, engine):
    """One newline at the end is the shell's, not the prompt's."""
    done = run("run", model, "-n", 6, *GREEDY, input=f"{PROMPT}\n".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == continuation(engine, PROMPT, 6) + "\n"


def test_a_prompt_file_need_not_be_utf_8(model, engine, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Café\r\n\n\n".encode("latin-1"))
    done = run("run", model, "-n", 6, "--prompt-file", tmp_path / "latin1.txt", *GREEDY)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == continuation(engine, "Caf\udce9\r\n\n", 6) + "\n"


def test_an_empty_standard_input_is_an_empty_prompt(model, engine):
    done = run("run", model, "-n", 3, *GREEDY)  # nothing on standard input
    assert done.stdout.decode() == continuation(engine, "", 3) + "\n"


def test_stop_and_sampling_options_reach_the_engine(model, engine):
    text = continuation(engine, PROMPT, 12)
    stop = text[len(text) // 2 :][:2]
    done = run("run", model, "-p", PROMPT, "-n", 12, "--stop", "never", "--stop", stop, *GREEDY)
    assert done.stdout.decode() == text[: text.index(stop)] + "\n"
    sampling = Sampling(1.3, 50, 0.9, 0.01, 1.4, 10, seed=7)
    options = ["--temp", 1.3, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repeat-penalty", 1.4]
    options += ["--repeat-last-n", 10, "--seed", 7]
    done = run("run", model, "-p", PROMPT, "-n", 12, *options)
    assert done.stdout.decode() == continuation(engine, PROMPT, 12, sampling, ignore_eos=False) + "\n"


def test_an_end_token_ends_the_text_unless_it_is_ignored(engine, tmp_path):
    tokens = engine.generate(PROMPT, Sampling(0.0), 8, ignore_eos=True).tokens
    position = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    ending_model = write_random_mixtral(tmp_path / "ends.gguf", eos=tokens[position])
    done = run("run", ending_model, "-p", PROMPT, "--temp", 0, "--stats")
    assert done.stdout.decode() == engine.tokenizer.decode(tokens[:position], continuing=True) + "\n"
    assert f"generation {position + 1} tokens" in done.stderr.decode()
    ignoring = run("run", ending_model, "-p", PROMPT, "-n", 8, "--temp", 0, "--stats", "--ignore-eos")
    assert "generation 8 tokens" in ignoring.stderr.decode()


def test_zero_tokens_print_an_empty_line(model):
    done = run("run", model, "-p", PROMPT, "-n", 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"\n", b"")


def test_more_tokens_than_the_context_are_refused(model):
    fails_in_one_line(run("run", model, "-p", PROMPT, "-n", 40, "-c", 20), "exceed the context of 20", "--ctx")


def test_a_missing_gpu_gives_one_line_with_the_remedy(model):
    fails_in_one_line(
        run("run", model, "-p", "x", "-n", 1, "--device", "cuda", "--gpu-memory", "24GiB"), "use --device cpu"
    )


def test_fiddler_device_in_the_environment_is_the_default_device(model, monkeypatch):
    monkeypatch.setenv("FIDDLER_DEVICE", "cuda")
    fails_in_one_line(run("run", model, "-p", "x", "-n", 1), "use --device cpu")
    assert run("run", model, "-p", "x", "-n", 0, "--device", "cpu").returncode == 0
    monkeypatch.setenv("FIDDLER_DEVICE", "cpu")
    done = run("run", model, "-p", "x", "--gpu-memory", "24GiB")
    assert done.returncode == 2
    assert b"FIDDLER_DEVICE=cpu: leave out one" in done.stderr
    monkeypatch.setenv("FIDDLER_DEVICE", "tpu")
    done = run("run", model, "-p", "x", "-n", 1)
    assert done.returncode == 2
    assert b"'tpu'" in done.stderr


def test_a_character_that_stdout_cannot_encode_becomes_a_question_mark(model, engine):
    expected = continuation(engine, PROMPT, 12)
    assert not expected.isascii()
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii:strict"}
    done = run("run", model, "-p", PROMPT, "-n", 12, *GREEDY, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.encode("ascii", "replace") + b"\n"


def test_a_reader_that_closes_the_pipe_ends_the_run_silently_with_code_1(model):
    with start("run", model, "-p", PROMPT, "-n", 590, *GREEDY) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(model):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        done = run("inspect", model, stdout=full, env=buffered)
    assert done.returncode == 1
    reason = rb"No space left on device; make room[^\n]+"
    assert re.fullmatch(rb"error: standard output: cannot be written: " + reason + rb"\n", done.stderr)


def test_a_closed_stdout_is_one_line():
    command = ["sh", "-c", '"$0" -m fiddler run never-opened.gguf -p x >&-', sys.executable]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (1, 1)
    assert b"standard output is closed" in done.stderr


def interrupt(process):
    """Send SIGINT; return stdout once exit code and stderr are those of a quiet end."""
    process.send_signal(signal.SIGINT)
    out, message = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert re.fullmatch(rb"(compiling kernels .*\n)?", message)
    return out


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
def test_an_interrupt_while_torch_is_imported_ends_quietly(model):
    process = start("run", model, "-p", PROMPT)
    wait_until(process, lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    assert interrupt(process) == b""


def test_an_interrupt_while_kernels_are_compiled_ends_quietly(model, tmp_path):
    process = start("run", model, "-p", PROMPT, NUMBA_CACHE_DIR=str(tmp_path))
    wait_until(process, lambda: any(tmp_path.rglob("*.nbc")))  # the first kernel is compiled, larger ones follow
    assert interrupt(process) == b""


def test_an_interrupt_while_generating_leaves_the_text_so_far(model):
    process = start("run", model, "-p", PROMPT, "-n", 590, *GREEDY)
    first = process.stdout.read(1)
    assert len(first + interrupt(process)) < 590


def test_inspect_prints_json_or_text(model):
    done = run("inspect", model, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["architecture"]["experts"] == 4
    assert b"4 experts" in run("inspect", model).stdout


def test_convert_writes_a_file_that_inspect_reads_and_replaces_it_only_with_force(tmp_path):
    target = tmp_path / "tiny.gguf"
    done = run("convert", TINY, target)
    assert (done.returncode, done.stdout) == (0, b"")
    assert str(target).encode() in done.stderr
    content = target.read_bytes()
    fails_in_one_line(run("convert", TINY, target), "--force")
    assert target.read_bytes() == content
    assert run("convert", TINY, target, "--force", "--dtype", "f16").returncode == 0
    assert json.loads(run("inspect", target, "--json").stdout)["types"]["F16"] > 0
    fails_in_one_line(run("convert", tmp_path, tmp_path / "other.gguf"), "config.json")


def test_calibrate_stores_a_measurement_and_shows_it_again(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FIDDLER_TUNING", "intel")
    shown = run("calibrate", "--show")
    assert (shown.returncode, shown.stdout) == (0, b"kernel settings: intel (from FIDDLER_TUNING)\n")
    assert b"no calibration is stored" in shown.stderr
    done = run("calibrate", model, "--device", "cpu", "-t", 1)
    assert done.returncode == 0
    assert b"ms an expert for tokens" in done.stdout
    assert b"tuned for intel" in done.stdout
    assert run("calibrate", "--show").stdout == shown.stdout + done.stdout
    for arguments in ((model, "--show"), (model, "--kernels"), ("--show", "--kernels")):
        assert run("calibrate", *arguments).returncode == 2


def test_calibrate_chooses_and_keeps_the_kernels_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = run("calibrate", "--kernels")
    assert done.returncode == 0
    row, _, _ = done.stdout.decode().partition(" ")
    assert f"  {row} " in done.stdout.decode()
    assert run("calibrate", "--show").stdout.decode() == f"kernel settings: {row} (fitted on this CPU)\n"


def test_gpu_options_that_contradict_or_are_out_of_range_are_refused(model):
    assert run("run", model, "-p", "x", "--gpu-memory", "24GiB", "--device", "cpu").returncode == 2
    assert run("run", model, "-p", "x", "--gpu-experts", -1).returncode == 2
    assert run("run", model, "-p", "x", "--missing", "both").returncode == 2
