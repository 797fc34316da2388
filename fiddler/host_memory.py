"""Memory that this process uses and could have, as the operating system counts it. Knows no models."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Memory", "available_memory", "cached_bytes", "in_memory", "memory_for_sequences", "peak_memory", "populate"]

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LAST_BIT = bytes(value & 1 for value in range(256))
_POPULATE_READ = 22  # MADV_POPULATE_READ, since Linux 5.14
_USED = re.compile(rb"^(VmHWM|RssAnon):\s*(\d+)", re.MULTILINE)  # of /proc/self/status, in KiB


@dataclass(frozen=True)
class Memory:
    """Bytes. `peak_resident` includes touched pages of mapped files; `anonymous` is the process's own, now."""

    peak_resident: int
    anonymous: int


def peak_memory() -> Memory:
    """This process's memory; `anonymous`, Linux's RssAnon, is 0 where the system does not report it."""
    try:
        kib = {name: int(value) for name, value in _USED.findall(Path("/proc/self/status").read_bytes())}
    except OSError:
        kib = {}
    if b"VmHWM" in kib:  # rather than getrusage, whose peak includes the parent process before it started us
        peak = kib[b"VmHWM"] * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Memory(peak, kib.get(b"RssAnon", 0) * 1024)


def available_memory() -> int:
    """Bytes available without swapping; 0 where the system does not report them.

    They are Linux's MemAvailable, or what this process's control groups leave it, where that is less.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    return min([available, *_control_groups()])


def _control_groups() -> list[int]:
    """Bytes that each control group (version 2) leaves this process: its limit less memory that cannot be dropped."""
    try:
        name = next(
            line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"
        )
    except (OSError, StopIteration):
        return []
    left = []
    folder = _CONTROL_GROUPS / name.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            left.append(max(0, int(limit) - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))))
        if group == _CONTROL_GROUPS:
            break
    return left


def in_memory(path: Path | None) -> bool:
    """Whether a file is in memory (tmpfs), so that its pages cannot be dropped; None stands for memory of our own."""
    if path is None:
        return True
    try:
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        real = path.resolve()
    except OSError:
        return False
    containing = [fields for fields in mounts if real.is_relative_to(fields[1])]
    return bool(containing) and max(containing, key=lambda fields: len(fields[1]))[2] in ("tmpfs", "ramfs", "hugetlbfs")


def cached_bytes(address: int, nbytes: int) -> int:
    """Bytes of a mapping that are in memory already, whoever read them; 0 where the system does not report them.

    address: start of a page.
    """
    pages = -(-nbytes // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    try:
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), resident):
            return 0
    except (OSError, AttributeError):
        return 0
    return bytes(resident).translate(_LAST_BIT).count(1) * mmap.PAGESIZE


def populate(address: int, nbytes: int) -> int:
    """Enter a mapping's pages into this process's page tables, reading those that are on disk; returns 0 on success.

    address: start of a page. Later accesses are faster; where the system cannot do it, nothing is lost.
    """
    try:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return -1
    return int(madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _POPULATE_READ))


def memory_for_sequences(available: int, weights: int) -> int | None:
    """Bytes that the KV caches of all sequences may take, of `available` bytes; None where these are unknown (0).

    weights: bytes of the mapped file, whose pages count as available until they are needed. The result is half of the
    memory left beside them, but at least a sixteenth of `available`: where the file does not fit anyway, each byte is
    read from disk again in every step.
    """
    if not available:
        return None
    return max((available - weights) // 2, available // 16)
