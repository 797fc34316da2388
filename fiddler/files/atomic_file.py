"""Atomic writes: a file is written under a temporary name beside its target, then renamed, so it is whole or absent.

Knows directories, signals and disks; does not know the content.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fiddler.errors import RequestError, ResourceError

__all__ = ["check_space", "check_target", "whole_file"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


class _TerminatedError(BaseException):
    """Turns a terminating signal into an exception, so that `finally` runs; `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def check_target(target: Path, *, force: bool) -> None:
    """Raise RequestError if no file can be created at `target`, or if one exists and `force` is not set."""
    if target.is_dir():
        raise RequestError(f"{target} is a directory; name the file to write")
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} is not a directory; create it first")
    if target.exists() and not target.is_file():
        raise RequestError(f"{target} is not an ordinary file; name another")
    if target.exists() and not force:
        raise _exists(target)


def check_space(target: Path, needed: int) -> None:
    """Raise ResourceError if the disk of `target` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ResourceError(
            f"{target.parent} has {free} bytes free, and {target.name} needs {needed}; "
            "free some space or write to another disk"
        )


@contextlib.contextmanager
def whole_file(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield the path of an empty temporary file beside `target`; when the block ends, it becomes `target`.

    Its bytes are on the disk before it is renamed (fsync). If the block raises, or the process gets SIGINT, SIGTERM
    or SIGHUP, the temporary file is removed and `target` stays unchanged; a SIGKILL or a power cut leaves
    `.NAME.<random>.tmp` behind. Without `force`, a file that appeared at `target` meanwhile is not replaced.
    Raises RequestError if `target` exists or its directory is not writable, ResourceError if the disk is full.
    """
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(6)}.tmp")
    with _signals_raise():
        try:
            try:
                os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            except OSError as error:
                raise RequestError(f"cannot write in {target.parent}: {error.strerror}") from error
            try:
                yield temporary
                _sync(temporary)
                _publish(temporary, target, force=force)
            except OSError as error:
                problem = f"{target.parent} is full" if error.errno in _NO_SPACE else f"cannot write {target}"
                raise ResourceError(f"{problem}: {error.strerror}; make room or write elsewhere") from error
        finally:
            temporary.unlink(missing_ok=True)
    # Sync the directory, so that the name survives a crash of the machine; not every file system supports that.
    with contextlib.suppress(OSError):
        _sync(target.parent)


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, does not replace an existing file
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if target.exists():
            raise _exists(target) from None
        temporary.replace(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(target: Path) -> RequestError:
    return RequestError(f"{target} exists; --force (force=True) replaces it")


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP unwind the stack; afterwards their default action is restored.

    Applies only to signals without another handler, and only in the main thread: Python delivers signals there.
    """
    handled: list[signal.Signals] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError(number)

    try:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _TERMINATING:
                    if signal.getsignal(number) is signal.SIG_DFL:
                        signal.signal(number, unwind)
                        handled.append(number)
            yield
        finally:
            for number in handled:
                signal.signal(number, signal.SIG_DFL)
    except _TerminatedError as terminated:
        signal.raise_signal(terminated.number)
        raise
