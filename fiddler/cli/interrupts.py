"""Ctrl-C from the first moment: exit code 130 and silence. Imports nothing that takes time, not even `typing`."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType
    from typing import NoReturn
else:
    import _signal as signal  # the same functions: `signal` itself imports enum and collections first, which takes 5 ms

__all__ = ["exit_on_interrupt", "leave_at_once"]


def exit_on_interrupt() -> None:
    """Have SIGINT end the process at once, unless it is ignored, as in a shell's background jobs.

    `bin/fiddler` starts Python with the signal blocked: one that has come meanwhile takes effect here.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))


def leave_at_once(_number: int, _frame: FrameType | None) -> NoReturn:
    """Handles SIGINT: exits without an exception, which would abort the process in the middle of an import of torch."""
    os._exit(130)
