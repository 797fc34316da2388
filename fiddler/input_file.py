"""Opens input files and reads them, each read bounded: regular files, /dev/null and, of the command line's, pipes.

A path can lead to a pipe that nobody writes to, a device without an end, or a sparse file larger than memory: reading
these would hang, or take all memory. Standard library only, so that every room may import it; knows no format.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from fiddler.errors import RequestError

__all__ = ["open_regular", "present", "read_input", "read_regular", "read_stdin"]

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # NONBLOCK: a pipe's open waits for a writer
_PIECE = 1 << 20  # largest single read [bytes]
_PATIENCE = 1000  # time without data until a line says so, or a pipe without a writer is refused [ms]
_TERMINALS = (4, 5, *range(136, 144))  # major device numbers of Linux: consoles, /dev/tty, pseudo terminals


def present(path: Path) -> bool:
    """Whether anything has this name, a broken link or a pipe, too: what is there must be readable."""
    return os.path.lexists(path)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or /dev/null as an empty one, for reading.

    Raises OSError for anything else, before it is opened: `strerror` says what it is, in a form that follows "cannot be
    read: ".
    """
    _refuse_special(path.stat())
    descriptor = os.open(path, _FLAGS)
    try:
        _refuse_special(os.fstat(descriptor))  # another file may have this name by now
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises OSError as `open_regular` does, and for a larger file: by its size, or, where it grows meanwhile, after
    `limit` + 1 bytes.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise _too_large(limit)
        return _read(file.fileno(), limit)


def read_input(
    path: Path,
    limit: int,
    remedy: str,
    too_large: str = "",
    notify: Callable[[str], None] = lambda text: None,
) -> bytes:
    """The content, at most `limit` bytes, of a file that the user named: a regular one, a pipe or a terminal.

    notify: called with one line after a second without data. Raises RequestError, one line that names the path, for any
    other kind of file, a named pipe without a writer, and more bytes than `limit`. It ends with `remedy`, or, where the
    file is larger, with `too_large`.
    """
    try:
        if not _is_stream(path.stat()):
            return read_regular(path, limit)
        descriptor = os.open(path, _FLAGS)
        try:
            status = os.fstat(descriptor)
            if not _is_stream(status):  # another file has this name by now
                _refuse_special(status)
            return _read_stream(descriptor, limit, str(path), notify, nonblocking=True)
        finally:
            os.close(descriptor)
    except OSError as failure:
        raise _error(str(path), failure, remedy, too_large) from None


def read_stdin(
    descriptor: int, limit: int, remedy: str, too_large: str = "", notify: Callable[[str], None] = lambda text: None
) -> bytes:
    """All of standard input, at most `limit` bytes, from its descriptor. Arguments and errors: see `read_input`."""
    try:
        status = os.fstat(descriptor)
        if not (_is_stream(status) or stat.S_ISSOCK(status.st_mode)):
            _refuse_special(status)
        return _read_stream(descriptor, limit, "standard input", notify, nonblocking=False)
    except OSError as failure:
        raise _error("standard input", failure, remedy, too_large) from None


def _error(name: str, failure: OSError, remedy: str, too_large: str) -> RequestError:
    end = too_large if too_large and failure.errno == errno.EFBIG else remedy
    return RequestError(f"{name}: cannot be read: {failure.strerror}; {end}")


def _read(descriptor: int, limit: int) -> bytes:
    parts: list[bytes] = []
    total = 0
    while part := os.read(descriptor, min(_PIECE, limit + 1 - total)):
        parts.append(part)
        total += len(part)
        if total > limit:
            raise _too_large(limit)
    return b"".join(parts)


def _read_stream(descriptor: int, limit: int, name: str, notify: Callable[[str], None], *, nonblocking: bool) -> bytes:
    """Read to the end, waiting for data. nonblocking: opened so, from a path; standard input stays as it is."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    total = 0
    patience: int | None = _PATIENCE
    while True:
        ready = poll.poll(patience)
        try:
            part = os.read(descriptor, min(_PIECE, limit + 1 - total)) if ready or nonblocking else None
        except BlockingIOError:
            part = None
        if part is None:
            if not ready:
                notify(f"waiting for data from {name}")
                patience = None
            continue
        if not part:
            if not ready and not parts:  # no data and no hang-up: no writer since it was opened
                raise OSError(errno.ENXIO, "it is a pipe that nobody writes to")
            return b"".join(parts)
        parts.append(part)
        total += len(part)
        if total > limit:
            raise _too_large(limit)


def _is_stream(status: os.stat_result) -> bool:
    """Whether it is a pipe or, taken for one, a terminal."""
    return stat.S_ISFIFO(status.st_mode) or (stat.S_ISCHR(status.st_mode) and os.major(status.st_rdev) in _TERMINALS)


def _refuse_special(status: os.stat_result) -> None:
    """Raise OSError unless it is a regular file or /dev/null."""
    mode = status.st_mode
    if stat.S_ISREG(mode) or (stat.S_ISCHR(mode) and status.st_rdev == Path(os.devnull).stat().st_rdev):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for matches, name in kinds if matches(mode)), "a device")
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")


def _too_large(limit: int) -> OSError:
    size = f"{limit >> 20} MiB" if limit % (1 << 20) == 0 else f"{limit} bytes"
    return OSError(errno.EFBIG, f"it is larger than {size}")
