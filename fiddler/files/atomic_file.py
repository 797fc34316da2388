"""Atomic writes: a file is written without a name, or under a temporary one, and gets its own when it is complete.

Where the file system has files without a name (O_TMPFILE), a killed process leaves nothing: the kernel frees the
bytes. Elsewhere it leaves `.NAME.<random>.tmp` beside the target. A writer holds a lock on its temporary file, so the
next writer of that target can tell those of killed ones, and removes them.

Knows directories, locks and disks; does not know the content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from fiddler.errors import RequestError, ResourceError
from fiddler.files.destination import Destination, cannot_be_written, find_destination
from fiddler.files.terminating_signals import signals_deferred, signals_raise

__all__ = ["OutputFile", "check_space", "check_target", "whole_file"]

_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_RANDOM_BYTES = 6  # of a temporary name


class OutputFile:
    """An output while it is written; errors name it."""

    def __init__(self, name: Path, descriptor: int) -> None:
        self._name, self._descriptor = name, descriptor

    def write(self, data: bytes | memoryview) -> None:
        """Append all of the bytes. Raises ResourceError where the disk is full, RequestError for other failures."""
        rest = memoryview(data)
        if rest.nbytes:
            rest = rest.cast("B")
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            raise cannot_be_written(self._name, error) from error


def check_target(target: Path, *, force: bool) -> Destination:
    """Where `target` lies. Raises RequestError if it cannot be written, or if it exists and `force` is not set.

    Pipes and devices are not opened here, and need no `force`: they are not replaced.
    """
    to = find_destination(target)
    folder = to.path.parent
    if to.mode is not None and stat.S_ISDIR(to.mode):
        raise RequestError(f"{target} is a directory; name the file to write")
    if to.is_stream:
        return to
    if not folder.is_dir():
        raise RequestError(f"{target}: cannot be written: {target.parent} is not a directory; create it first")
    if to.mode is not None and not force:
        raise _exists(target)
    if to.mode is not None and not os.access(to.path, os.W_OK):
        raise RequestError(f"{target}: cannot be written: it is write-protected; name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(f"{target}: cannot be written: {folder} cannot be written in; name a file elsewhere")
    return to


def check_space(target: Path, needed: int) -> None:
    """Raise ResourceError if the disk of `target`, unless that is a pipe or device, has fewer than `needed` bytes free.

    Raises RequestError where that cannot be found out.
    """
    to = find_destination(target)
    if to.is_stream:
        return
    try:
        free = shutil.disk_usage(to.path.parent).free
    except OSError as error:
        raise cannot_be_written(target, error) from error
    if free < needed:
        raise ResourceError(
            f"{target}: needs {needed} bytes, and its disk has {free} free; free some space or write to another disk"
        )


@contextlib.contextmanager
def whole_file(target: Path, *, force: bool) -> Iterator[OutputFile]:
    """Yield an empty output, whose bytes become the file `target` when the block ends; nothing if the block raises.

    A block may begin before long work: it is known then that the file can be written. Its bytes are on the disk before
    it gets its name (fsync). A file that it replaces stays whole until then, and gives it its permissions; a symbolic
    link stays, and its target is replaced. Without `force`, a file that appeared at `target` meanwhile is not replaced.
    A pipe or a device, also /dev/stdout, is written straight through.

    Whatever ends the process leaves nothing behind, but for SIGKILL and power cuts where the file system has no files
    without a name: the next `whole_file` of that target removes what they left.

    Raises RequestError if `target` exists or cannot be written, ResourceError if the disk is full.
    """
    to = check_target(target, force=force)
    if to.is_stream:
        descriptor = to.open_stream()
        try:
            yield OutputFile(target, descriptor)
        finally:
            os.close(descriptor)
        return
    _remove_abandoned(to.path)
    nameless = _open_nameless(to.path)
    with _named(to, force) if nameless is None else _nameless(to, nameless, force) as descriptor:
        yield OutputFile(target, descriptor)
        with _errors_name(target):
            if to.mode is not None:
                os.fchmod(descriptor, to.mode & 0o777)
            os.fsync(descriptor)
    # Sync the folder, so that the name survives a crash of the machine; not every file system supports that.
    with contextlib.suppress(OSError):
        folder = os.open(to.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def _nameless(to: Destination, descriptor: int, force: bool) -> Iterator[int]:
    """Give the open file without a name that of the target when the block ends; closes it."""
    try:
        yield descriptor
        with _errors_name(to.name):
            try:
                _link(descriptor, to.path)  # unlike a rename, does not replace an existing file
            except FileExistsError:
                if not force:
                    raise _exists(to.name) from None
                _lock(descriptor)
                temporary = _temporary(to.path)
                with signals_deferred():
                    try:
                        _link(descriptor, temporary)
                        temporary.replace(to.path)
                    finally:
                        temporary.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(to: Destination, force: bool) -> Iterator[int]:
    """Yield an open file under a temporary name, which becomes the target when the block ends."""
    temporary = _temporary(to.path)
    with signals_raise():
        try:
            with _errors_name(to.name):
                descriptor = _open_locked(temporary)
            try:
                yield descriptor
                with _errors_name(to.name):
                    _publish(temporary, to, force)
            finally:
                os.close(descriptor)
        finally:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, to: Destination, force: bool) -> None:
    if force:
        temporary.replace(to.path)
        return
    try:
        os.link(temporary, to.path)
    except FileExistsError:
        raise _exists(to.name) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if to.path.exists():
            raise _exists(to.name) from None
        temporary.replace(to.path)


def _open_nameless(target: Path) -> int | None:
    """A new file in the folder of `target` that has no name yet; None where it could not be given one later."""
    probe = _temporary(target)
    try:
        descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
        try:
            _lock(descriptor)
            _link(descriptor, probe)
        finally:
            os.close(descriptor)
            probe.unlink(missing_ok=True)
        return os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o666)
    except OSError:  # the reason is named where a file with a name cannot be made either
        return None


def _open_locked(temporary: Path) -> int:
    """A new file, locked. Another process may have removed it before it was locked: then it is made again."""
    while True:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        _lock(descriptor)
        if temporary.exists():
            return descriptor
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of `target` that no process holds a lock on: their writers were killed."""
    name = re.compile(re.escape(_stem(target)) + rf"[0-9a-f]{{{2 * _RANDOM_BYTES}}}\.tmp")
    try:
        found = [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:
        return  # a folder that may be written in and not be listed
    for path in found:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if stat.S_ISREG(os.fstat(descriptor).st_mode):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            finally:
                os.close(descriptor)


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: there, nobody removes what is left
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _link(descriptor: int, name: Path) -> None:
    """Give an open file a name that does not exist."""
    # Only with a folder's descriptor does os.link call linkat, which follows the link in /proc; the path is absolute.
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=descriptor, follow_symlinks=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_stem(target)}{secrets.token_hex(_RANDOM_BYTES)}.tmp")


def _stem(target: Path) -> str:
    """The beginning of the names of a target's temporary files; a file's name has 255 bytes at most."""
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}."


@contextlib.contextmanager
def _errors_name(name: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_be_written(name, error) from error


def _exists(target: Path) -> RequestError:
    return RequestError(f"{target} exists; --force (force=True) replaces it")
