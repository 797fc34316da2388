"""Input files: what a path may lead to, and that every read ends at its limit."""

from __future__ import annotations

import os
import pty
import socket
import threading
import time
from pathlib import Path

import pytest

from fiddler import input_file
from fiddler.errors import RequestError
from fiddler.input_file import open_regular, present, read_input, read_regular, read_stdin
from oracles.permissions import permissions_count
from oracles.special_files import replace_by

KINDS = {
    "folder": "it is a folder",
    "pipe": "it is a pipe",
    "socket": "",  # stat names it, opening it fails
    "zero": "it is a device, not a regular file",
    "sparse": "it is larger than 1 MiB",
    "missing": "No such file",
    "loop": "symbolic links",
    "unreadable": "Permission denied",
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(input_file, "_PATIENCE", 50)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_or_too_large_is_refused_at_once_and_by_name(tmp_path, kind):
    path = replace_by(tmp_path / kind, kind)
    started = time.perf_counter()
    with permissions_count(), pytest.raises(OSError, match=r".") as refused:
        read_regular(path, 1 << 20)
    assert KINDS[kind] in refused.value.strerror
    with (
        permissions_count(),
        pytest.raises(RequestError, match=f"{kind}: cannot be read: .*{KINDS[kind]}.*; give another"),
    ):
        read_input(path, 1 << 20, "give another")
    assert time.perf_counter() - started < 1
    assert present(path) == (kind != "missing")


def test_the_null_device_is_an_empty_file():
    with open_regular(Path("/dev/null")) as file:
        assert file.read() == b""
    assert read_regular(Path("/dev/null"), 0) == b""
    assert read_input(Path("/dev/null"), 0, "") == b""


@pytest.mark.parametrize("size, limit", [(0, 0), (5, 5), (5, 6), (3 << 20, 3 << 20)])
def test_a_file_of_at_most_the_limit_is_read_whole(tmp_path, size, limit):
    content = os.urandom(size)
    (path := tmp_path / "file").write_bytes(content)
    assert read_regular(path, limit) == content
    assert read_input(path, limit, "") == content


def test_a_file_that_grows_while_it_is_read_is_refused_after_the_limit(tmp_path, monkeypatch):
    (path := tmp_path / "file").write_bytes(b"x" * 10)
    read = os.read

    def growing(descriptor, size):
        with path.open("ab") as file:
            file.write(b"y" * 10)
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", growing)
    with pytest.raises(OSError, match="larger than 25 bytes"):
        read_regular(path, 25)


def test_a_pipe_is_read_to_its_end_and_no_further_than_the_limit(tmp_path):
    for name in ("named", "descriptor"):
        for size, limit in ((0, 0), (100_000, 100_000), (100_001, 100_000)):
            reader, writer = os.pipe()
            path = Path(f"/dev/fd/{reader}")
            if name == "named":
                os.mkfifo(path := tmp_path / f"{size}")

            def write(path=path, writer=writer, size=size):
                try:
                    with path.open("wb") if path.is_relative_to(tmp_path) else os.fdopen(writer, "wb") as file:
                        file.write(b"x" * size)
                except BrokenPipeError:  # the reader has had enough
                    pass

            thread = threading.Thread(target=write)
            thread.start()
            if size > limit:
                with pytest.raises(RequestError, match="larger than 100000 bytes; less"):
                    read_input(path, limit, "give another", "less")
            elif size or name == "descriptor":
                assert read_input(path, limit, "") == b"x" * size
            else:
                path.open("rb").close()  # lets the writer go
            os.close(reader)
            thread.join()
            if name == "named":
                os.close(writer)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("way", ["named", "descriptor", "standard input"])
def test_a_silent_pipe_gives_one_notice_and_is_waited_for(tmp_path, way):
    if way == "named":
        os.mkfifo(path := tmp_path / "pipe")
        reader, writer = os.open(path, os.O_RDONLY | os.O_NONBLOCK), os.open(path, os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        path = Path(f"/dev/fd/{reader}")
    notices: list[str] = []

    def write():
        deadline = time.monotonic() + 10
        while not notices and time.monotonic() < deadline:
            time.sleep(0.01)
        os.write(writer, b"text")
        time.sleep(0.1)
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    if way == "standard input":
        assert read_stdin(reader, 99, "", "", notices.append) == b"text"
    else:
        assert read_input(path, 99, "", "", notices.append) == b"text"
    thread.join()
    os.close(reader)
    assert notices == [f"waiting for data from {way if way == 'standard input' else path}"]


def test_a_writer_that_comes_within_a_second_is_waited_for(tmp_path):
    os.mkfifo(path := tmp_path / "pipe")
    timer = threading.Timer(0.2, lambda: path.write_bytes(b"late"))
    timer.start()
    assert read_input(path, 99, "") == b"late"
    timer.join()


def test_standard_input_may_be_a_file_or_a_socket_but_no_folder_or_endless_device(tmp_path):
    (path := tmp_path / "file").write_bytes(b"text")
    with path.open("rb") as file:
        assert read_stdin(file.fileno(), 4, "") == b"text"
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"text")
        one.shutdown(socket.SHUT_WR)
        assert read_stdin(other.fileno(), 4, "") == b"text"
    for wrong, message in ((tmp_path, "it is a folder"), (Path("/dev/zero"), "it is a device")):
        descriptor = os.open(wrong, os.O_RDONLY)
        with pytest.raises(RequestError, match=f"standard input: cannot be read: {message}.*; give a text"):
            read_stdin(descriptor, 4, "give a text")
        os.close(descriptor)


def test_a_terminal_named_by_its_path_is_read_to_ctrl_d():
    controller, terminal = pty.openpty()
    os.write(controller, b"typed\n\x04")
    assert read_input(Path(os.ttyname(terminal)), 99, "") == b"typed\n"
    os.close(controller)
    os.close(terminal)


def test_nothing_stays_open_after_an_error(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in (tmp_path, pipe, Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(OSError, match=r"."):
            read_regular(path, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
