"""Semaphores between a device's queue and the host: the queue waits for a number that a host thread writes.

Knows numbers and streams; not the work on either side of a wait.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch

from fiddler.device import cuda_driver
from fiddler.errors import ResourceError

__all__ = ["CudaSemaphore", "HostSemaphore", "Semaphore"]


class Semaphore(Protocol):
    """Orders a device's queue after host work. Its waits are numbered 1, 2, 3, ..."""

    def next(self) -> int:
        """The number of the next wait. One thread at a time may call it."""
        ...

    def wait(self, number: int) -> None:
        """Hold the queue until wait `number` is released; where the device cannot wait, hold the caller."""
        ...

    def open(self, number: int | None = None) -> None:
        """Release wait `number` and all before it; None: all waits that have a number."""
        ...


class HostSemaphore:
    """A `Semaphore` at which the calling thread waits for another. One thread at a time waits, another one opens.

    Uses no lock: Ctrl-C between acquiring one and entering the block that releases it would leave it locked.
    """

    def __init__(self) -> None:
        self.numbered = self._opened = 0
        self._changed: SimpleQueue[None] = SimpleQueue()

    def next(self) -> int:
        """Implements `Semaphore.next`."""
        self.numbered += 1
        return self.numbered

    def wait(self, number: int) -> None:
        """Implements `Semaphore.wait`."""
        while not self._changed.empty():
            self._changed.get()
        while self._opened < number:
            self._changed.get()

    def open(self, number: int | None = None) -> None:
        """Implements `Semaphore.open`."""
        self._opened = max(self._opened, self.numbered if number is None else number)
        self._changed.put(None)


class CudaSemaphore(HostSemaphore):
    """The stream waits for a number in pinned memory; where the driver cannot do that, the caller waits."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._number = self._memory.numpy().view(np.uint32)
        self._stream_waits = self._wait(0)

    def wait(self, number: int) -> None:
        """Implements `Semaphore.wait`."""
        if not self._stream_waits:
            super().wait(number)
        elif not self._wait(number):
            raise ResourceError("the driver no longer lets the GPU wait for the CPU; use --device cpu")

    def open(self, number: int | None = None) -> None:
        """Implements `Semaphore.open`."""
        if self._stream_waits:
            self._number[0] = (self.numbered if number is None else number) & 0xFFFFFFFF
        else:
            super().open(number)

    def _wait(self, number: int) -> bool:
        stream = torch.cuda.current_stream().cuda_stream
        return cuda_driver.wait_for_value(stream, self._memory.data_ptr(), number & 0xFFFFFFFF)
