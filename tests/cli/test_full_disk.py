"""Every command that writes, on a full disk: what was there stays byte for byte, one line names the file, exit code 1.

Outputs that are no regular files, too, since they share a process with these. The disk is a tmpfs of 64 KiB in a mount
namespace, which needs the right to make one: see `tools/full_disk.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from oracles.synthetic import write_random_mixtral
from tools import full_disk

FULL = "cannot be written: No space left on device; make room"
OUTPUTS = {
    "run --probs-file": f"disk/out: {FULL}",
    "run --probs-file, new": f"disk/out: {FULL}",
    "bench --trace": f"disk/out: {FULL}",
    "bench --plot": f"disk/out: {FULL}",
    "perplexity --expert-counts": f"disk/out: {FULL}",
    "run --prompt-cache": "disk/out: needs ",
    "run --prompt-cache, full meanwhile": f"disk/out: {FULL}",
    "batch": f"disk/out: {FULL}",
    "convert": "disk/out: needs ",
    "convert --force": "disk/out: needs ",
    "convert --force, full meanwhile": f"disk/out: {FULL}",
    "convert --type": "disk/out: needs ",
    "convert --type --force, full meanwhile": f"disk/out: {FULL}",
    "convert IN.gguf": "disk/out: needs ",
    "convert IN.gguf --force, full meanwhile": f"disk/out: {FULL}",
    "quantize": "disk/out: needs ",
    "quantize --force, full meanwhile": f"disk/out: {FULL}",
    "calibrate": f".json: {FULL}",
    "calibrate --kernels": "tuning.json: the kernel settings cannot be stored: No space left on device; make room",
}
PRINTED = [
    "--help",
    "--version",
    "run",
    "run --beams",
    "bench",
    "perplexity",
    "inspect",
    "inspect --json",
    "calibrate",
    "calibrate --show",
    "serve",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full-disk")
    refused = full_disk.may_mount(folder)
    if refused:
        pytest.skip(f"no disk of its own can be mounted here: {refused}")
    return full_disk.in_a_namespace(folder, write_random_mixtral(folder / "tiny.gguf"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_on_a_full_disk_is_one_line_and_leaves_all_files_as_they_were(results, name):
    result = results[name]
    errors = [line for line in result["errors"].splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert OUTPUTS[name] in errors[0]
    assert result["errors"].splitlines()[-1] == errors[0]
    assert (result["code"], result["changed"], result["new"]) == (1, [], [])


def test_a_chat_that_cannot_be_saved_goes_on(results):
    result = results["chat /save"]
    assert result["code"] is True
    assert f"disk/saved: {FULL}" in result["errors"]
    assert (result["changed"], result["new"]) == ([], [])


def test_kernel_settings_that_cannot_be_stored_leave_the_earlier_ones(results):
    result = results["kernel settings"]
    assert (result["code"], result["changed"], result["new"]) == ("No space left on device", [], [])


def test_seconds_of_steps_that_cannot_be_stored_are_a_warning(results):
    result = results["seconds of steps"]
    (warning,) = [line for line in result["errors"].splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: the times of steps cannot be stored: ")
    assert "/disk/fiddler/step-" in warning
    assert f".json: {FULL}" in warning
    assert (result["code"], result["changed"], result["new"]) == (0, [], [])


@pytest.mark.parametrize("name", PRINTED)
def test_standard_output_on_a_full_disk_is_one_line(results, name):
    result = results[f"{name} > full"]
    assert result["code"] == 1
    *_, last = result["errors"].splitlines()
    assert last == f"error: standard output: {FULL}, or send it elsewhere"


SPECIAL = [name for name in OUTPUTS if not name.startswith("calibrate") and "," not in name and "--force" not in name]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_pipe_that_nobody_reads_is_refused_in_one_line_before_any_work(results, name):
    result = results[f"{name} > pipe"]
    reason = (
        "a prompt cache is read again" if "cache" in name else "is a pipe that nobody reads; start its reader first"
    )
    assert result["code"] == 1
    (line,) = result["errors"].splitlines()
    assert line.startswith("error: ")
    assert f"/pipe{'' if 'cache' in name else ':'} " in line
    assert reason in line


@pytest.mark.parametrize("name", [name for name in SPECIAL if name != "bench --plot"])
def test_the_null_device_is_an_output_as_any_other(results, name):
    result = results[f"{name} > null"]
    assert result["code"] == 0
    assert "error" not in result["errors"].replace("(errors: 0)", "")
    assert Path("/dev/null").is_char_device()


def test_every_case_is_looked_at(results):
    others = {"chat /save", "kernel settings", "seconds of steps"} | {f"{name} > pipe" for name in SPECIAL}
    others |= {f"{name} > null" for name in SPECIAL if name != "bench --plot"}
    assert results.keys() == OUTPUTS.keys() | others | {f"{name} > full" for name in PRINTED}
