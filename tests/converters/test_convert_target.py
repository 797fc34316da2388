"""The target file of a conversion: refused or replaced, small disks, and interruptions of a real process."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from fiddler.converters import convert
from fiddler.errors import RequestError, ResourceError
from tools.measure_kills import NAMED

TINY = Path(__file__).parents[1] / "data" / "tiny"


def test_an_existing_target_needs_force(tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(RequestError, match=re.escape(f"{target} exists; --force")):
        convert(TINY, target)
    assert target.read_bytes() == b"precious"
    convert(TINY, target, force=True)
    assert gguf.GGUFReader(target).tensors


def test_a_linked_target_is_written_where_the_link_points(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.gguf"
    link.symlink_to(tmp_path / "disk" / "real.gguf")
    convert(TINY, link)
    assert link.is_symlink()
    assert (tmp_path / "disk" / "real.gguf").is_file()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "link.gguf"])
def test_the_source_is_never_overwritten(tmp_path, name):
    source = shutil.copytree(TINY, tmp_path / "hf")
    (tmp_path / "link.gguf").symlink_to(source / "tokenizer.model")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    target = source / name if name != "link.gguf" else tmp_path / name
    with pytest.raises(RequestError, match="belongs to the checkpoint"):
        convert(source, target, force=True)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_target_within_the_source_folder_is_written_and_replaced(tmp_path):
    source = shutil.copytree(TINY, tmp_path / "hf")
    convert(source, source / "out.gguf")
    convert(source, source / "out.gguf", force=True)


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(RequestError, match="dtype is 'q8_0'; choose 'bf16' or 'f16'"):
        convert(TINY, tmp_path / "out.gguf", "q8_0")


def test_a_small_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=470_000))
    with pytest.raises(ResourceError, match=r"out\.gguf: needs 49\d{4} bytes, and its disk has 470000 free; free some"):
        convert(TINY, tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


SLOW_CONVERSION = """
import signal, sys, time
from fiddler.converters import convert
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it is without nohup
def progress(done, total):
    print(done, total, flush=True)
    time.sleep(0.03)
convert(sys.argv[1], sys.argv[2], force=True, progress=progress)
"""


@pytest.mark.parametrize("moment", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("signal_number", "files"),
    [
        (signal.SIGINT, "nameless"),
        (signal.SIGINT, "named"),
        (signal.SIGTERM, "nameless"),
        (signal.SIGTERM, "named"),
        (signal.SIGHUP, "named"),
        (signal.SIGKILL, "nameless"),
        (signal.SIGKILL, "named"),
    ],
)
def test_a_signal_during_conversion_leaves_the_target_as_it_was(tmp_path, signal_number, files, moment):
    target = tmp_path / "out.gguf"
    exists = moment == 0.4  # with an existing target
    if exists:
        target.write_bytes(b"precious")
    process = subprocess.Popen(
        [sys.executable, "-c", (NAMED if files == "named" else "") + SLOW_CONVERSION, TINY, target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        done, total = map(int, line.split())
        if done >= moment * total:
            process.send_signal(signal_number)
            break
    process.communicate(timeout=20)
    assert process.returncode == -signal_number
    if exists:
        assert target.read_bytes() == b"precious"
    else:
        assert not target.exists()
    others = [path.name for path in tmp_path.iterdir() if path != target]
    if (signal_number, files) == (signal.SIGKILL, "named"):
        assert re.fullmatch(r"\.out\.gguf\.[0-9a-f]{12}\.tmp", others[0])
        convert(TINY, target, force=True)  # removes it
        assert list(tmp_path.iterdir()) == [target]
    else:
        assert others == []


def test_the_null_device_and_a_pipe_get_the_same_bytes_as_a_file(tmp_path):
    whole = convert(TINY, tmp_path / "out.gguf")
    assert convert(TINY, "/dev/null").nbytes == whole.nbytes
    command = [sys.executable, "-m", "fiddler", "convert", TINY, "/dev/stdout"]
    piped = subprocess.run(command, capture_output=True, check=True).stdout
    assert piped == (tmp_path / "out.gguf").read_bytes()
    assert len(piped) == whole.nbytes
