"""Files cut short while a command reads them: one line that names the file, exit code 1. Replaced ones do no harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oracles.command import run, start

TINY = Path(__file__).parents[1] / "data" / "tiny"

READ = """
import mmap, os, signal, sys, threading
import numpy as np
from fiddler.files.mapped_files import ROWS, add_mapping, table_address
from fiddler.files.bus_error import exit_on_bus_error
how, path = sys.argv[1:]
gone = mmap.mmap(-1, 4096)
add_mapping(gone, "gone.gguf")
del gone
exit_on_bus_error(table_address(), ROWS)
with open(path, "w+b") as file:
    file.truncate(1 << 20)
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if how != "foreign":
        add_mapping(mapping, "some.gguf")
    content = np.frombuffer(mapping, np.uint8)
    file.truncate(4096)
content[:4096].sum()  # still there
if how == "sent":
    os.kill(os.getpid(), signal.SIGBUS)
threads = [threading.Thread(target=content.sum) for _ in range(8 if how == "threads" else 1)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.mark.parametrize("how", ["listed", "threads", "foreign", "sent"])
def test_a_mapping_that_ends_early_is_one_line_in_any_thread_and_no_other_sigbus_is_touched(how, tmp_path):
    done = subprocess.run([sys.executable, "-c", READ, how, str(tmp_path / "file")], capture_output=True, text=True)
    line = "error: some.gguf: was cut short while in use, or its disk failed; restore the file and start again\n"
    ours = how in ("listed", "threads")
    assert (done.returncode, done.stderr) == ((1, line) if ours else (-signal.SIGBUS, ""))


def running(model):
    """`fiddler run` that has written some of a long text."""
    arguments = "-p", "The old fiddler lived", "-n", 1000, "--temp", 0, "--ignore-eos", "-c", 1024
    process = start("run", model, *arguments)
    while not os.read(process.stdout.fileno(), 64).strip():
        assert process.poll() is None, process.stderr.read()
    return process


@pytest.fixture
def model(tmp_path):
    from fiddler.loading import DEMO_MODEL

    return Path(shutil.copy(DEMO_MODEL, tmp_path / "model.gguf"))


def test_run_says_in_one_line_that_its_model_was_cut_short(model):
    process = running(model)
    os.truncate(model, 1 << 20)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.decode().splitlines()[-1]) == (
        1,
        f"error: {model}: was cut short while in use, or its disk failed; restore the file and start again",
    )


def test_run_goes_on_where_its_model_is_replaced(model):
    process = running(model)
    other = model.with_name("other")
    other.write_bytes(b"")
    other.replace(model)
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert len(text) > 1000


def test_convert_says_in_one_line_that_its_source_was_cut_short(tmp_path):
    """Between the headers, which are whole, and the weights."""
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    code = (
        "import os, sys; from pathlib import Path; import fiddler; from fiddler.converters import checkpoint, convert\n"
        "whole = checkpoint.Checkpoint.open\n"
        "def cut(folder):\n"
        "    opened, file = whole(folder), folder / 'model.safetensors'\n"
        "    os.truncate(file, file.stat().st_size // 2)\n"
        "    return opened\n"
        "checkpoint.Checkpoint.open = cut\n"
        "try:\n"
        "    convert(sys.argv[1], sys.argv[2])\n"
        "except fiddler.FiddlerError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{source / 'model.safetensors'} was cut short while in use; download it again\n"
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
    assert run("convert", source, tmp_path / "out.gguf").returncode == 1
