"""Terminating signals while a temporary file has a name: turned into an exception, or deferred. Knows no files."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["signals_deferred", "signals_raise"]

_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


class _TerminatedError(BaseException):
    """Turns a terminating signal into an exception, so that `finally` runs; `except Exception` does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
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


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP that arrive within the block take effect at its end. For blocks of milliseconds.

    Only in the main thread: Python delivers signals there.
    """
    arrived: list[int] = []
    handlers = {}

    def remember(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *_TERMINATING):
                if (handler := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    handlers[number] = handler
                    signal.signal(number, remember)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for waiting in arrived:
            signal.raise_signal(waiting)
