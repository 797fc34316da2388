"""Wrong usages of every command: exit code 2, at once, before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numba
import pytest
import typer

from fiddler.cli.checked_numbers import most_threads, numbers
from fiddler.errors import RequestError, ResourceError
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.generation.request import Request
from fiddler.loading import load
from oracles.command import run

RUN, BATCH, BENCH = ["run", "-p", "x"], ["batch", "in.jsonl", "out.jsonl"], ["bench", "model.gguf"]
WRONG = [
    *[[*command, "-t", threads] for command in (RUN, BATCH, BENCH) for threads in ("0", "10000", str(2**63))],
    ["perplexity", "-f", "text", "-t", "10000"],
    ["calibrate", "-t", "10000"],
    [*BENCH, "-t", "1,10000"],
    *[[*command, "--stop", ""] for command in (RUN, BATCH)],
    *[[*command, "--gpu-memory", size] for command in (RUN, BATCH, BENCH) for size in ("x", "0", "-1", "1e99", "²GiB")],
    [*RUN, "--gpu-memory", "1GiB", "--device", "cpu"],
    [*RUN, "-c", "0"],
    [*RUN, "-n", "-2"],
    *[[*RUN, "-n", value] for value in ("x", "1.5", "inf", "1_000", "١٢", "9" * 5000)],
    *[[*RUN, option, value] for option in ("--temp", "--dry-multiplier") for value in ("inf", "nan", "-1", "1e999")],
    *[
        [*RUN, option, value]
        for option in ("--top-p", "--min-p", "--typical", "--xtc-threshold")
        for value in ("2", "nan")
    ],
    *[[*RUN, "--seed", value] for value in ("-2", str(2**64), "9" * 30)],
    [*RUN, "--repeat-penalty", "0"],
    [*RUN, "--n-probs", "-1"],
    *[[*RUN, "--logit-bias", value] for value in ("x", "1+nan", "1+inf", "1+1e7", "²+1", "١+1", "1+١", "1+1_0")],
    [*RUN, "--logit-bias", "9" * 5000 + "+1"],
    *[[*RUN, "--beams", value] for value in ("0", "10000000", str(2**63))],
    [*RUN, "--beams", "2", "--n-best", "3"],
    [*RUN, "--beams", "2", "--length-penalty", "nan"],
    [*RUN, "--beams", "2", "--top-k", "3"],
    [*RUN, "--json-schema", "{}", "--grammar", "x"],
    [*RUN, "--probs-file", "probs"],
    [*RUN, "--chat", "--special"],
    [*BATCH, "-np", "0"],
    *[[*BENCH, "-p", value] for value in ("1-999999999999", "²", "-5", "1-", "5-1", "1-2000", "16777217")],
    [*BENCH, "-p", "0", "-n", "0"],
    *[[*BENCH, "-pg", value] for value in ("5", "1,2,3", "1,²")],
    *[[*BENCH, option, "99999999999"] for option in ("-d", "-r", "-n")],
    [*BENCH, "--kernels", "--tokens", "0"],
    [*BENCH, "--kernels", "--types", "q4"],
    *[["perplexity", "-f", "text", "-c", value] for value in ("2", "5_12", "５１２")],
    ["calibrate", "--show", "--kernels"],
    ["convert"],
    ["inspect"],
    ["nonsense"],
]
INVOKE = """
import json, sys
from typer.testing import CliRunner
from fiddler.cli.app import command_line
results = []
for arguments in json.load(sys.stdin):
    done = CliRunner().invoke(command_line(), arguments)
    results.append([done.exit_code, repr(done.exception), "torch" in sys.modules or "numba" in sys.modules])
print(json.dumps(results))
"""


def test_every_wrong_usage_exits_with_2_before_torch_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", INVOKE],
        input=json.dumps(WRONG).encode(),
        capture_output=True,
        check=False,
        env=os.environ | {"FIDDLER_DEVICE": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    results = zip(WRONG, json.loads(done.stdout), strict=True)
    assert [(arguments, result) for arguments, result in results if result != [2, "SystemExit(2)", False]] == []


def test_the_number_of_threads_is_numbas_own():
    assert most_threads() == numba.config.NUMBA_NUM_THREADS


def test_numbers_of_an_option_are_a_thousand_at_most():
    assert numbers("-p", "1,8-10") == [1, 8, 9, 10]
    assert len(numbers("-p", "1-1000")) == 1000
    for text in ("1-1001", "1-500,1-501", "1," * 1000 + "1"):
        with pytest.raises(typer.BadParameter, match="more than 1000"):
            numbers("-p", text)


def test_more_beams_than_the_vocabulary_or_memory_holds_are_refused_at_once(monkeypatch):
    engine = load(threads=1)
    with pytest.raises(RequestError, match="4097 beams; the vocabulary has 4096 tokens"):
        engine.start_beams(Request("hi"), BeamOptions(4097))
    engine.start_beams(Request("hi"), BeamOptions(4096))
    monkeypatch.setattr(type(engine.runner), "room", lambda self, weights: 64 << 20)
    with pytest.raises(ResourceError, match=r"4096 beams need 0\.9 GiB at least, and 0\.1 GiB are available"):
        engine.start_beams(Request("hi"), BeamOptions(4096))
    engine.start_beams(Request("hi"), BeamOptions(4))


def test_with_stdin_and_stderr_closed_only_the_answer_is_on_stdout():
    command = '"$0" -m fiddler run -p Once -n 3 --temp 0 --stats 0<&- 2>&-'
    environment = os.environ | {"FIDDLER_DEVICE": "cpu"}
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, check=False, env=environment)
    assert done.stdout == run("run", "-p", "Once", "-n", 3, "--temp", 0).stdout
    assert done.returncode == 0


def test_an_error_with_stderr_closed_is_not_on_stdout_and_still_exits_with_1():
    done = subprocess.run(
        ["sh", "-c", '"$0" -m fiddler inspect nowhere.gguf 2>&-', sys.executable], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, b"")


STRANGE = os.fsdecode(b"\xff\xfe") + "\x1b[31mRED\x07\u202e\nline"


@pytest.mark.parametrize("kind", ["missing", "loop", "folder", "text"])
def test_paths_of_any_name_and_kind_give_one_printable_line(kind, tmp_path):
    """Each argument that takes a path, in one process: no `internal:`, no control character."""
    path = Path(tmp_path / STRANGE)
    if kind == "loop":
        path.symlink_to(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no model")
    given = str(path)
    commands = [
        ["inspect", given],
        ["convert", given, str(tmp_path / "out.gguf")],
        ["convert", str(Path(__file__).parents[1] / "data" / "tiny"), given, *(["--force"] if kind != "text" else [])],
        ["run", given, "-p", "x"],
        ["run", "-p", "x", "--json-schema", given],
        ["run", "-p", "x", "--grammar", given],
        ["batch", given, str(tmp_path / "results")],
        ["perplexity", given, "-f", given],
        ["perplexity", "-f", given],
        ["bench", given],
    ]
    if kind == "missing":
        del commands[2]  # converts
    code = (
        "import sys, json, os\nfrom fiddler.cli.app import main\n"
        "for arguments in json.load(open(0, encoding='utf-8')):\n"
        "    sys.argv = ['fiddler', *arguments]\n"
        "    try: main()\n"
        "    except SystemExit as left: print(left.code, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(commands).encode(),
        capture_output=True,
        check=False,
        env=os.environ | {"FIDDLER_DEVICE": "cpu", "PYTHONUTF8": "1"},
    )
    messages = done.stderr.decode().splitlines()
    assert done.stdout.split() == [b"1"] * len(commands), messages
    assert [line for line in messages if not line.startswith("error: ") or not line.isprintable()] == []
    assert "internal" not in done.stderr.decode()
    assert len(messages) == len(commands)
