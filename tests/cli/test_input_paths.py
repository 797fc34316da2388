"""Every argument that is read, times everything that a path may lead to: one line, soon, and little memory."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
from typer.models import ArgumentInfo

import fiddler
from fiddler import input_file
from fiddler.cli.app import command_line, main
from fiddler.converters import convert
from oracles.command import FIDDLER, PATIENCE
from oracles.permissions import permissions_count
from oracles.special_files import KINDS, replace_by
from oracles.synthetic import write_random_mixtral

TINY = Path(__file__).parents[1] / "data" / "tiny"
SECONDS, MEMORY = 5, 100 << 20  # limits of a refusal, the latter above what imports take [bytes]

ARGUMENTS = {
    "inspect MODEL.gguf": "inspect PATH",
    "run MODEL.gguf": "run PATH -p x",
    "run --prompt-file": "run MODEL --prompt-file PATH",
    "run --json-schema": "run MODEL -p x --json-schema PATH",
    "run --grammar": "run MODEL -p x --grammar PATH",
    "run --chat-template-file": "run MODEL --chat-template-file PATH",
    "run --prompt-cache": "run MODEL -p x -n 1 --prompt-cache PATH",
    "run --expert-counts": "run MODEL -p x --expert-counts PATH",
    "batch IN.jsonl": "batch PATH OUT -m MODEL",
    "batch OUT.jsonl": "batch IN PATH -m MODEL",
    "batch --model": "batch IN OUT -m PATH",
    "batch --expert-counts": "batch IN OUT -m MODEL --expert-counts PATH",
    "perplexity MODEL.gguf": "perplexity PATH -f IN",
    "perplexity --file": "perplexity MODEL -f PATH",
    "perplexity --expert-counts": "perplexity MODEL -f IN -c 3 --expert-counts PATH",
    "bench MODEL.gguf": "bench PATH",
    "bench --expert-counts": "bench MODEL --expert-counts PATH",
    "calibrate MODEL.gguf": "calibrate PATH",
    "convert SOURCE": "convert PATH OUT",
    "convert --imatrix": "convert MODEL OUT --type Q4_0 --imatrix PATH",
    "quantize IN.gguf": "quantize PATH OUT --type Q8_0",
    "quantize --imatrix": "quantize MODEL OUT --type Q4_0 --imatrix PATH",
    "serve MODEL.gguf": "serve PATH --port 0",
    "serve --chat-template-file": "serve MODEL --port 0 --chat-template-file PATH",
    "serve --expert-counts": "serve MODEL --port 0 --expert-counts PATH",
}
ALSO_WRITTEN = {"run --prompt-cache", "batch OUT.jsonl", "perplexity --expert-counts"}  # made where missing
WRITTEN_THROUGH = {"batch OUT.jsonl", "perplexity --expert-counts"}  # a device takes them
ONLY_WRITTEN = {"run --probs-file", "bench --trace", "bench --plot", "convert OUT.gguf", "quantize OUT.gguf"}
OF_TEXT_OR_FILE = {"run --json-schema", "run --grammar"}

REQUIRED = ("config.json", "model.safetensors", "tokenizer.model")
OPTIONAL = (
    "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, after an import of everything that the commands import."""
    path = write_random_mixtral(tmp_path_factory.mktemp("paths") / "tiny.gguf")
    fiddler.load(path).generate("x", max_tokens=1, constraint=fiddler.Constraint.grammar('root ::= "x"'))
    convert(TINY, path.with_name("converted.gguf"))
    return path


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """A pipe without a writer is refused after 0.1 s instead of 1 s; on a terminal `run` opens a chat."""
    monkeypatch.setattr(input_file, "_PATIENCE", 100)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def memory(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def refused(monkeypatch, capfd, arguments: list[object]) -> str:
    """Run the command in this process; it must fail in one line, which is returned, within the limits."""
    monkeypatch.setattr(sys, "argv", ["fiddler", *map(str, arguments)])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, started = memory("VmRSS"), time.perf_counter()
    with permissions_count(), pytest.raises(SystemExit) as left:
        main()
    assert time.perf_counter() - started < SECONDS
    assert memory("VmHWM") - resident < MEMORY
    out, errors = capfd.readouterr()
    assert (left.value.code, out) == (1, ""), errors
    assert re.fullmatch(r"error: [^\n]+\n", errors)
    assert "internal" not in errors
    return errors


def test_the_table_has_every_argument_that_takes_a_path():
    """And typer leaves each to us: its own error has several lines."""
    found = set()
    for command in (registered.callback for registered in command_line().registered_commands):
        for parameter in inspect.signature(command, eval_str=True).parameters.values():
            kind, declared, *_ = (*get_args(parameter.annotation), None, None)
            if Path not in (kind, *get_args(kind)):
                continue
            assert not declared.readable
            names = [name for name in (declared.default, *(declared.param_decls or ())) if isinstance(name, str)]
            names = names or ["--" + parameter.name.replace("_", "-")]
            argument = isinstance(declared, ArgumentInfo)
            found.add(f"{command.__name__} {declared.metavar.strip('[]') if argument else max(names, key=len)}")
    assert found == ARGUMENTS.keys() - OF_TEXT_OR_FILE | ONLY_WRITTEN


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_an_argument_that_cannot_be_read_is_refused_in_one_line(argument, kind, model, tmp_path, monkeypatch, capfd):
    path = tmp_path / "the input"
    if (kind == "missing" and argument in ALSO_WRITTEN) or (kind == "zero" and argument in WRITTEN_THROUGH):
        return
    replace_by(path, kind)
    (tmp_path / "in").write_text('{"id": 1, "prompt": "a text of some tokens"}\n')
    places = {"PATH": path, "MODEL": model, "IN": tmp_path / "in", "OUT": tmp_path / "out"}
    if argument == "run --chat-template-file":
        monkeypatch.setattr("fiddler.cli.run._on_terminal", lambda: True)
    message = refused(monkeypatch, capfd, [places.get(word, word) for word in ARGUMENTS[argument].split()])
    assert "the input" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REQUIRED + OPTIONAL)
def test_a_file_of_a_checkpoint_that_cannot_be_read_is_refused_in_one_line(name, kind, tmp_path, monkeypatch, capfd):
    if kind == "missing" and name in OPTIONAL:
        return
    folder = Path(shutil.copytree(TINY, tmp_path / "hf"))
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink()
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    replace_by(folder / name, kind)
    message = refused(monkeypatch, capfd, ["convert", folder, tmp_path / "out.gguf"])
    assert Path(name).name.removesuffix(".index.json") in message
    assert not (tmp_path / "out.gguf").exists()


def test_the_null_device_is_empty_input(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["fiddler", "run", str(model), "--prompt-file", "/dev/null", "-n", "2"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    capfd.readouterr()
    for arguments, message in (
        (["inspect", "/dev/null"], "is empty"),
        (["batch", "/dev/null", tmp_path / "out", "-m", model], "holds no prompt"),
        (["perplexity", model, "-f", "/dev/null"], "/dev/null: "),
        (["run", model, "-p", "x", "--expert-counts", "/dev/null"], "no file of expert counts"),
    ):
        assert message in refused(monkeypatch, capfd, arguments)


def test_a_line_without_an_end_is_refused_by_its_length(model, tmp_path, monkeypatch, capfd):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"id": 1, "prompt": "a"}) + "\n" + '{"id": 2, "prompt": "')
    os.truncate(path, 64 << 30)
    message = refused(monkeypatch, capfd, ["batch", path, tmp_path / "out", "-m", model])
    assert "in.jsonl, line 2: is longer than 16 MiB" in message


def measured(command: str, *arguments: object) -> tuple[int, str, float, int]:
    """Exit code, standard error, seconds and peak memory [bytes] of `fiddler` as "$@" in a shell's command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        ["bash", "-c", command, *FIDDLER, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with process.stderr:
        errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, errors, time.perf_counter() - started, 1024 * usage.ru_maxrss


def test_endless_and_silent_inputs_of_a_real_process(model, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    sparse = tmp_path / "sparse"
    sparse.touch()
    os.truncate(sparse, 64 << 30)
    code, _, _, least = measured('exec "$0" "$@"', "run", model, "--prompt-file", tmp_path / "none")
    assert code == 1
    for command, arguments, message in (
        ('exec "$0" "$@" < <(yes)', ["run", model], "the context of 1024 tokens holds no more"),
        ('exec "$0" "$@" < /dev/zero', ["run", model], "standard input: cannot be read: it is a device"),
        ('exec "$0" "$@" --prompt-file <(yes)', ["run", model], "the context of 1024 tokens holds no more"),
        ('exec "$0" "$@"', ["run", model, "--prompt-file", tmp_path / "pipe"], "a pipe that nobody writes to"),
        ('exec "$0" "$@"', ["batch", sparse, tmp_path / "out", "-m", model], "line 1: is longer than 16 MiB"),
    ):
        code, errors, seconds, peak = measured(command, *arguments)
        assert (code, errors.count("\n")) == (1, 1), errors
        assert message in errors
        assert seconds < SECONDS
        assert peak - least < MEMORY


def test_a_pipe_of_the_shell_and_a_slow_standard_input_are_read_and_waited_for(model):
    expected = fiddler.load(model).generate("The old fiddler", fiddler.Sampling(0.0), 4).text + "\n"
    arguments = ["run", str(model), "--temp", "0", "-n", "4"]
    processes = []
    for from_file in (True, False):
        end, writer = os.pipe()
        prompt = ["--prompt-file", f"/dev/fd/{end}"] if from_file else []
        process = subprocess.Popen(
            [*FIDDLER, *arguments, *prompt],
            stdin=subprocess.DEVNULL if from_file else end,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=[end],
        )
        os.close(end)
        processes.append((process, writer, f"/dev/fd/{end}" if from_file else "standard input"))
    for process, writer, name in processes:
        assert process.stderr.readline() == f"waiting for data from {name}\n"
        os.write(writer, b"The old fiddler\n")
        os.close(writer)
    for process, _, _ in processes:
        out, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, out, errors) == (0, expected, "")
