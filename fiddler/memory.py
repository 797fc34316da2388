"""What memory this process uses, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "peak_memory"]


@dataclass(frozen=True)
class Memory:
    """Bytes. `peak_resident` includes touched pages of mapped files; `anonymous` is the process's own, now."""

    peak_resident: int
    anonymous: int


def peak_memory() -> Memory:
    """This process's memory; `anonymous` is 0 where the system does not tell (it is Linux's RssAnon)."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return Memory(peak, 0)
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), "RssAnon: 0 kB")
    return Memory(peak, int(line.split()[1]) * 1024)
