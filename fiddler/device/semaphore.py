"""Semaphores between a device's queue and the host: the queue waits for a number that a thread writes."""

from __future__ import annotations

from queue import SimpleQueue
from typing import Protocol

import numpy as np
import torch

from fiddler.device import cuda_driver
from fiddler.errors import ResourceError

__all__ = ["CudaSemaphore", "HostSemaphore", "Semaphore"]


class Semaphore(Protocol):
    """Where a device's queue waits for the host, again and again."""

    def next(self) -> int:
        """The number of another wait. One thread at a time asks."""
        ...

    def wait(self, number: int) -> None:
        """The queue goes on only when the gate has been opened that far; nor does the caller, if need be."""
        ...

    def open(self, number: int | None = None) -> None:
        """Let this wait and those before it pass; None: all that have a number."""
        ...


class HostSemaphore:
    """A `Semaphore` at which the caller waits itself, for another thread. One thread at a time waits, and another one opens.

    Without a lock: Ctrl-C, between taking one and the block that would release it, leaves it taken.
    """

    def __init__(self) -> None:
        self.numbered = self._opened = 0
        self._changed: SimpleQueue[None] = SimpleQueue()

    def next(self) -> int:
        """A `Semaphore`'s."""
        self.numbered += 1
        return self.numbered

    def wait(self, number: int) -> None:
        """A `Semaphore`'s."""
        while not self._changed.empty():
            self._changed.get()
        while self._opened < number:
            self._changed.get()

    def open(self, number: int | None = None) -> None:
        """A `Semaphore`'s."""
        self._opened = max(self._opened, self.numbered if number is None else number)
        self._changed.put(None)


class CudaSemaphore(HostSemaphore):
    """The stream waits for a number in pinned memory; where the driver cannot do that, the caller waits."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._seen = self._memory.numpy().view(np.uint32)
        self._by_stream = self._wait(0)

    def wait(self, number: int) -> None:
        """A `Semaphore`'s."""
        if not self._by_stream:
            super().wait(number)
        elif not self._wait(number):
            raise ResourceError("the GPU no longer waits for the CPU; use --device cpu")

    def open(self, number: int | None = None) -> None:
        """A `Semaphore`'s."""
        if self._by_stream:
            self._seen[0] = (self.numbered if number is None else number) & 0xFFFFFFFF
        else:
            super().open(number)

    def _wait(self, number: int) -> bool:
        stream = torch.cuda.current_stream().cuda_stream
        return cuda_driver.wait_for_value(stream, self._memory.data_ptr(), number & 0xFFFFFFFF)
