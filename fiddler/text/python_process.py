"""How a helper process starts: this Python, a module of ours, and nothing of the user's environment. Knows no task."""

from __future__ import annotations

import os
import sys

__all__ = ["command", "environment"]

# LANG for messages, TZ for `strftime_now`; the other two are how some Pythons find their library and their modules.
_INHERITED = ("PATH", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME")


def command(module: str, *arguments: float) -> list[str]:
    """A command line that calls `main(*arguments)` of a module, with numbers as arguments."""
    return [sys.executable, "-P", "-c", f"import {module} as it; it.main{(*arguments,)!r}"]


def environment() -> dict[str, str]:
    """PATH, LANG and TZ, and PYTHONPATH with the folders that this process imports from.

    No more: what a stranger's template or grammar runs beside should hold no tokens and no keys. LD_LIBRARY_PATH and
    PYTHONHOME stay where they are set, for a Python that does not start without them.
    """
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    return inherited | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
