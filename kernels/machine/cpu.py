"""What the system and LLVM say of this CPU: name, model, vendor, last-level cache. Knows no instructions or kernels."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

from llvmlite.binding import get_host_cpu_name
from numba.core import config as numba_config

__all__ = ["cpu_model", "cpu_name", "cpu_vendor", "last_level_cache"]

_CPUINFO = Path("/proc/cpuinfo")
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cpu_name() -> str:
    """LLVM's name of the CPU that Numba compiles for: the host, unless `NUMBA_CPU_NAME` says otherwise."""
    return str(numba_config.CPU_NAME or get_host_cpu_name())


def cpu_model() -> str:
    """The maker's name of this CPU, such as "AMD EPYC 9654"; the architecture where the system knows none."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str:
    """The maker, such as "AuthenticAMD" or "GenuineIntel"; "" where the system does not say."""
    return _cpuinfo("vendor_id")


@cache
def _cpuinfo(field: str) -> str:
    """A field of the first CPU in /proc/cpuinfo; "" where there is none."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def last_level_cache() -> int:
    """Bytes of the largest cache of the first CPU; 32 MiB where the system reports none."""
    sizes = [32 << 20]
    for path in _CACHES.glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) << 10)
    return max(sizes)
