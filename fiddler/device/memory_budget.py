"""One budget for all of a GPU's memory that this process uses. Knows bytes; not their purpose.

Torch counts its own allocations and caps them. The driver's part (its context, loaded code, graphs) is the growth of
the GPU's used memory since before there was a context, less torch's part.
"""

from __future__ import annotations

import math
import weakref

import torch

from fiddler.device import cuda_driver
from fiddler.errors import RequestError, ResourceError

__all__ = ["Budget", "GpuStartError", "at_least", "shown"]

_MARGIN = 256 << 20  # [bytes] that no plan uses: fragments of torch's allocator, code that is loaded later
_LEFT_FREE = 512 << 20  # [bytes] of a GPU's free memory that the default budget leaves to other programs


def shown(nbytes: int) -> str:
    """Bytes for a message, in GiB."""
    return f"{nbytes / 2**30:.2f} GiB"


def at_least(nbytes: int) -> str:
    """Bytes for a message, in GiB, rounded up: the size in the message suffices."""
    return f"{math.ceil(nbytes / 2**30 * 100) / 100:.2f}GiB"


class GpuStartError(ResourceError):
    """The machine has a GPU, but it cannot be used."""


_capping: dict[torch.device, object] = {}
"""Of each device the mark of the budget that caps torch."""


class Budget:
    """Limits this process to `total` bytes of a GPU's memory, as long as this object lives.

    Where there are several, the one that was made or settled last is the limit.
    """

    def __init__(self, device: torch.device, gpu_memory: int | None) -> None:
        """Start using `device`, up to `gpu_memory` bytes; None: nearly all that is free.

        Raises RequestError for more than the GPU's free memory; GpuStartError where the GPU does not start.
        """
        used_by_bus = cuda_driver.used_at_first()
        try:
            torch.zeros(1, device=device)
            free, capacity = torch.cuda.mem_get_info(device)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise GpuStartError(f"the GPU cannot be used: {reason}; use --device cpu") from error
        self.device = device
        used_before = self._used_on_device(used_by_bus)
        self._before = used_before or 0  # where it is unknown, other programs' memory counts as ours
        available = free + self.driver_bytes() + torch.cuda.memory_reserved(device)
        if gpu_memory is not None and gpu_memory > available:
            raise RequestError(
                f"--gpu-memory {shown(gpu_memory)}: this GPU has {shown(available)} free; "
                f"give at most {_floor(available)}"
            )
        self.total = available - _LEFT_FREE if gpu_memory is None else gpu_memory
        if self.total <= self.driver_bytes() + _MARGIN:
            needed = self.driver_bytes() + _MARGIN
            if gpu_memory is None:
                raise GpuStartError(f"the GPU has {shown(available)} free; {at_least(needed)} go before any model")
            raise RequestError(
                f"--gpu-memory {shown(gpu_memory)}: starting the GPU alone takes {at_least(needed)}; give more"
            )
        torch.cuda.empty_cache()  # what torch has cached counts
        self._mark = object()
        weakref.finalize(self, _uncap, device, self._mark).atexit = False
        self._cap((self.total - self.driver_bytes()) / capacity)

    def driver_bytes(self) -> int:
        """Bytes that this process uses outside torch's allocator."""
        free, capacity = torch.cuda.mem_get_info(self.device)
        return max(0, capacity - free - self._before - torch.cuda.memory_reserved(self.device))

    def used(self) -> int:
        """Bytes that this process uses now, by the driver's count."""
        free, capacity = torch.cuda.mem_get_info(self.device)
        return max(0, capacity - free - self._before)

    def room(self) -> int:
        """Bytes that may still be allocated, less a margin."""
        return self.total - self.driver_bytes() - torch.cuda.memory_allocated(self.device) - _MARGIN

    def settle(self) -> None:
        """Free torch's cached blocks and cap torch at the budget less the driver's present use."""
        capacity = torch.cuda.mem_get_info(self.device)[1]
        torch.cuda.empty_cache()
        self._cap((self.total - self.driver_bytes()) / capacity)

    def _cap(self, fraction: float) -> None:
        torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, fraction)), self.device)
        _capping[self.device] = self._mark

    def _used_on_device(self, used_by_bus: dict[int, int] | None) -> int | None:
        if not used_by_bus:
            return None
        bus = getattr(torch.cuda.get_device_properties(self.device), "pci_bus_id", None)
        if bus in used_by_bus:
            return used_by_bus[bus]
        return next(iter(used_by_bus.values())) if len(used_by_bus) == 1 else None


def _uncap(device: torch.device, mark: object) -> None:
    """Leave the whole GPU to this process again, unless another budget caps it."""
    if _capping.get(device) is mark:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        del _capping[device]


def _floor(nbytes: int) -> str:
    return f"{int(nbytes / 2**30 * 10) / 10:g}GiB"
