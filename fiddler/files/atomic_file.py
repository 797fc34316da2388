"""A file that appears whole or not at all: written under a temporary name beside its target, then renamed.

Knows directories, signals and disks; does not know what is written.
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
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS)
_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


class _TerminatedError(BaseException):
    """A terminating signal as an exception, so that `finally` runs; not caught by `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def check_target(target: Path, *, force: bool) -> None:
    """Raise RequestError where a file could not be created at `target`, or not without `force`."""
    if target.is_dir():
        raise RequestError(f"{target} is a directory; name the file to write")
    if not target.parent.is_dir():
        raise RequestError(f"{target.parent} is not a directory; create it first")
    if target.exists() and not target.is_file():
        raise RequestError(f"{target} is not an ordinary file; name another")
    if target.exists() and not force:
        raise _exists(target)


def check_space(target: Path, needed: int) -> None:
    """Raise ResourceError where the disk of `target` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ResourceError(
            f"{target.parent} has {free} bytes free, and {target.name} needs {needed}; "
            "free some space or write to another disk"
        )


@contextlib.contextmanager
def whole_file(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield the path of an empty temporary file beside `target`, which becomes `target` when the block ends.

    By then its bytes are on the disk (fsync). If the block raises, or the process gets SIGINT, SIGTERM or
    SIGHUP, the temporary file is removed and `target` is as it was; a SIGKILL or a power cut leaves
    `.NAME.<random>.tmp` behind. Without `force`, a file that appeared at `target` meanwhile is not replaced.
    Raises RequestError where `target` exists or its directory refuses, ResourceError where the disk is full.
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
                full = f"{target.parent} is full" if error.errno in _NO_SPACE else f"cannot write {target}"
                raise ResourceError(f"{full}: {error.strerror}; make room or write elsewhere") from error
        finally:
            temporary.unlink(missing_ok=True)
    # After a crash of the machine the name is there, too; not every file system can promise that.
    with contextlib.suppress(OSError):
        _sync(target.parent)


def _publish(temporary: Path, target: Path, *, force: bool) -> None:
    if force:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, refuses to replace
    except FileExistsError:
        raise _exists(target) from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
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
    """Within the block, SIGTERM and SIGHUP unwind the stack; afterwards they do what they did before.

    Only where nobody else handles them, and only in the main thread, where Python delivers signals.
    """
    mine: list[signal.Signals] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        raise _TerminatedError(number)

    try:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _TERMINATING:
                    if signal.getsignal(number) is signal.SIG_DFL:
                        signal.signal(number, unwind)
                        mine.append(number)
            yield
        finally:
            for number in mine:
                signal.signal(number, signal.SIG_DFL)
    except _TerminatedError as terminated:
        signal.raise_signal(terminated.number)
        raise
