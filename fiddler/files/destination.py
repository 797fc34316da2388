"""Where an output goes: a file that is to be made or replaced, or a pipe or device that is written straight through.

Knows names, links and descriptors; does not write.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from fiddler.errors import FiddlerError, RequestError, ResourceError

__all__ = ["Destination", "cannot_be_written", "find_destination"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_LINKS = 40  # as the kernel's
_STANDARD_STREAMS = (1, 2)  # stdout and stderr


@dataclass(frozen=True)
class Destination:
    """The place that the name of an output stands for."""

    name: Path  # as the user wrote it, for messages
    path: Path  # with symbolic links followed: a link stays, and its target is written
    mode: int | None  # of what is there (`st_mode`); None: nothing
    descriptor: int | None  # of this process, if the name stands for one, as /dev/stdout and /dev/fd/7 do

    @property
    def is_stream(self) -> bool:
        """Whether it is written straight through: a pipe, a device, a socket or an open descriptor."""
        if self.descriptor is not None:
            return True
        return self.mode is not None and not stat.S_ISREG(self.mode) and not stat.S_ISDIR(self.mode)

    def open_stream(self) -> int:
        """A new descriptor of a stream, to write to. Raises RequestError, also for a pipe that nobody reads."""
        try:
            if self.descriptor is not None:
                if fcntl.fcntl(self.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                    raise OSError(errno.EBADF, "open for reading only")
                return os.dup(self.descriptor)  # shares its position: nothing that was written is overwritten
            opened = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ENXIO and self.mode is not None and stat.S_ISFIFO(self.mode):
                raise RequestError(f"{self.name}: is a pipe that nobody reads; start its reader first") from None
            raise cannot_be_written(self.name, error) from error
        os.set_blocking(opened, True)  # only the opening must not wait
        return opened


def find_destination(name: Path) -> Destination:
    """Follow the links of `name`. Raises RequestError where they cannot be followed."""
    try:
        path = name
        for _ in range(_MAX_LINKS):
            path = Path(os.path.realpath(path.parent)) / path.name
            if path.parent == Path(os.path.realpath("/proc/self/fd")) and path.name.isdecimal():
                return Destination(name, path, os.fstat(int(path.name)).st_mode, int(path.name))
            mode = _mode(path)
            if (mode is not None and not stat.S_ISREG(mode)) or not path.is_symlink():
                return Destination(name, path, mode, _standard_stream(path))
            path = path.parent / path.readlink()
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    except OSError as error:
        raise cannot_be_written(name, error) from error
    except ValueError as error:  # a NUL in the name
        raise RequestError(f"{str(name)!a}: cannot be written: {error}; name another file") from None


def cannot_be_written(name: Path, error: OSError) -> FiddlerError:
    """What to raise where the output `name` cannot be written: the line names it, the reason and a remedy."""
    problem = f"{name}: cannot be written: {error.strerror}"
    if error.errno in _NO_SPACE:
        return ResourceError(f"{problem}; make room, or name a file elsewhere")
    return RequestError(f"{problem}; name a file elsewhere")


def _mode(path: Path) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ELOOP and not path.is_symlink():
            return None  # the folder is a loop, which is said where the file is opened
        raise


def _standard_stream(path: Path) -> int | None:
    """The descriptor of stdout or stderr, where it was redirected to this file: to replace it would lose its text."""
    for descriptor in _STANDARD_STREAMS:
        try:
            if os.path.samestat(os.fstat(descriptor), path.stat()) and path.is_file():
                return descriptor
        except OSError:
            continue
    return None
