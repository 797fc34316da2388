"""Outputs that are no regular files: written straight through, never replaced, and never waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fiddler.errors import RequestError, ResourceError
from fiddler.files.atomic_file import check_space, check_target, whole_file
from fiddler.files.destination import find_destination


def write(target, content, *, force=False):
    with whole_file(Path(target), force=force) as file:
        file.write(content)


@pytest.mark.parametrize("force", [True, False])
def test_the_null_device_takes_everything_and_stays(tmp_path, force):
    before = Path("/dev/null").stat()
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for name in ("/dev/null", link):
        write(name, b"new", force=force)
        check_space(Path(name), 1 << 60)
    assert os.path.samestat(before, Path("/dev/null").stat())
    assert link.is_symlink()
    assert not list(Path("/dev").glob(".*.tmp"))


def test_a_full_device_is_an_error_that_names_it():
    with pytest.raises(ResourceError, match="/dev/full: cannot be written: No space left on device; make room"):
        write("/dev/full", b"new")


def test_a_pipe_that_somebody_reads_gets_all_of_the_bytes_and_stays(tmp_path):
    pipe, content = tmp_path / "pipe", os.urandom(300_000)  # more than a pipe holds
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    while True:  # until the reader has opened it
        try:
            os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))
            write(pipe, content)
            break
        except RequestError:
            continue
    reader.join()
    assert read == [content]
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_pipe_that_nobody_reads_is_refused_at_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert check_target(pipe, force=False).is_stream  # a reader may come until it is opened
    with pytest.raises(RequestError, match="pipe: is a pipe that nobody reads; start its reader first"):
        write(pipe, b"new", force=True)


CODE = """
import sys
from pathlib import Path
from fiddler.files.atomic_file import whole_file
print("before", flush=True)
with whole_file(Path(sys.argv[1]), force=True) as file:
    file.write(b"written\\n")
print("after")
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "out"])
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_is_written_between_what_is_printed(tmp_path, name, kind):
    """Also where it is a file: neither is that replaced nor its text overwritten."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    command = [sys.executable, "-c", CODE, name]
    if kind == "file":
        with (tmp_path / "out").open("wb") as out:
            subprocess.run(command, stdout=out, check=True, cwd=tmp_path)
        printed = (tmp_path / "out").read_bytes()
    elif name == "out":
        pytest.skip("a pipe has no name here")
    else:
        printed = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=tmp_path).stdout
    assert printed == b"before\nwritten\nafter\n"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("loop", "Too many levels of symbolic links"),
        ("loop/file", "is not a directory"),
        ("file/inner", "is not a directory"),
        ("a" * 256, "File name too long"),
        ("/dev/fd/0", "open for reading only"),
        ("/dev/fd/999", "Bad file descriptor"),
        ("a\0b", "null byte"),
        ("..", "is a directory"),
        ("", "is a directory"),
    ],
)
def test_names_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with Path("/dev/null").open("rb") as null:
        stdin = os.dup(0)
        os.dup2(null.fileno(), 0)
        try:
            with pytest.raises(RequestError, match=reason) as caught:
                write(name, b"new", force=True)
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"loop", "file"}


def test_a_name_through_linked_folders_leads_to_the_file(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("folder/inner")
    assert find_destination(tmp_path / "link" / ".." / "x").path == tmp_path / "folder" / "x"
