"""One budget for all that this process takes of a GPU's memory. Knows bytes; not what they are for.

What torch allocates is counted by torch and capped there. The rest, the driver's own (its context, loaded code,
graphs), is the growth of the GPU's used memory since before there was a context, less torch's part.
"""

from __future__ import annotations

import math
import re

import torch

from fiddler.device import cuda_driver
from fiddler.errors import RequestError, ResourceError

__all__ = ["Budget", "GpuStartError", "at_least", "parse_size", "shown"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_MARGIN = 256 << 20  # that is never planned for: fragments of torch's allocator, code that is loaded later
_LEFT = 512 << 20  # of a GPU's free memory, that a default leaves to others


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24G", "8000MB" or "1073741824". Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper(), re.ASCII)
    if match is None or len(text) > 40 or float(match[1]) <= 0:
        raise RequestError(f"--gpu-memory {text[:40]!r}: give a size, as 24GiB or 8000MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def shown(nbytes: int) -> str:
    """Bytes for a message, in GiB."""
    return f"{nbytes / 2**30:.2f} GiB"


def at_least(nbytes: int) -> str:
    """Bytes for a message, in GiB, rounded up so that what it says suffices."""
    return f"{math.ceil(nbytes / 2**30 * 100) / 100:.2f}GiB"


class GpuStartError(ResourceError):
    """A GPU that is there and cannot be used."""


class Budget:
    """At most `total` bytes of a GPU's memory, all of this process."""

    def __init__(self, device: torch.device, asked: str | None) -> None:
        """Start using `device`, with what `asked` says, or nearly all that is free.

        Raises RequestError for a size that is none or is more than the GPU has free; GpuStartError where the GPU
        does not start.
        """
        wanted = None if asked is None else parse_size(asked)
        before = cuda_driver.used_at_first()
        try:
            torch.zeros(1, device=device)
            free, whole = torch.cuda.mem_get_info(device)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise GpuStartError(f"the GPU cannot be used: {reason}; use --device cpu") from error
        self.device = device
        used = self._bus(before)
        self._before = used or 0  # where nothing tells what others use, all that is used counts as ours
        most = free + self.driver_bytes() + torch.cuda.memory_reserved(device)
        if wanted is not None and wanted > most:
            raise RequestError(f"--gpu-memory {asked}: this GPU has {shown(most)} free; give at most {_floor(most)}")
        self.total = most - _LEFT if wanted is None else wanted
        if self.total <= self.driver_bytes() + _MARGIN:
            least = self.driver_bytes() + _MARGIN
            if asked is None:
                raise GpuStartError(f"the GPU has {shown(most)} free, and {at_least(least)} go before any model")
            raise RequestError(f"--gpu-memory {asked}: starting the GPU alone takes {at_least(least)}; give more")
        cap = min(1.0, (self.total - self.driver_bytes()) / whole)
        torch.cuda.set_per_process_memory_fraction(cap, device)

    def driver_bytes(self) -> int:
        """Bytes that this process uses and torch has not allocated."""
        free, whole = torch.cuda.mem_get_info(self.device)
        return max(0, whole - free - self._before - torch.cuda.memory_reserved(self.device))

    def used(self) -> int:
        """Bytes that this process uses now, by the driver's count."""
        free, whole = torch.cuda.mem_get_info(self.device)
        return max(0, whole - free - self._before)

    def room(self) -> int:
        """Bytes that may still be allocated, less a margin."""
        return self.total - self.driver_bytes() - torch.cuda.memory_allocated(self.device) - _MARGIN

    def settle(self) -> None:
        """Hold torch to what is left now that the driver has taken its part."""
        whole = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.empty_cache()
        cap = max(0.0, min(1.0, (self.total - self.driver_bytes()) / whole))
        torch.cuda.set_per_process_memory_fraction(cap, self.device)

    def _bus(self, used: dict[int, int] | None) -> int | None:
        if not used:
            return None
        bus = getattr(torch.cuda.get_device_properties(self.device), "pci_bus_id", None)
        if bus in used:
            return used[bus]
        return next(iter(used.values())) if len(used) == 1 else None


def _floor(nbytes: int) -> str:
    return f"{int(nbytes / 2**30 * 10) / 10:g}GiB"
