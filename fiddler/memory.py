"""What memory this process uses, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "available_memory", "peak_memory"]

_USED = ("VmHWM", "RssAnon")  # of /proc/self/status, in KiB


@dataclass(frozen=True)
class Memory:
    """Bytes. `peak_resident` includes touched pages of mapped files; `anonymous` is the process's own, now."""

    peak_resident: int
    anonymous: int


def peak_memory() -> Memory:
    """This process's memory; `anonymous` is 0 where the system does not tell (it is Linux's RssAnon)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if name in _USED}
    if "VmHWM" in kib:  # rather than getrusage, which counts what the parent was before it started us
        peak = kib["VmHWM"] * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(peak, kib.get("RssAnon", 0) * 1024)


def available_memory() -> int:
    """Bytes that could be had without swapping (Linux's MemAvailable); 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
