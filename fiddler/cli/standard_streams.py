"""Standard streams that were closed at the start (`2>&-`): no other file may get their numbers."""

from __future__ import annotations

import os
import sys

__all__ = ["open_closed"]


def open_closed() -> None:
    """Open /dev/null for each of descriptors 0, 1 and 2 that is closed: the next file would be opened as that one.

    Where stderr was closed, what is printed there is lost; `print` would print it to stdout. `sys.stdin` and
    `sys.stdout` stay None where they were closed.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
