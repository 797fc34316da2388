"""Host-to-device copies of weights from a mapped file. Knows addresses and streams; no models.

Three kinds, one interface. `PinnedCopy`: the mapping is pinned, and the GPU's copy engine reads it in place, at the
speed of the PCIe link and without a thread of ours. `BounceBufferCopy`: threads fill pinned buffers, where the driver
refuses to pin the mapping or the model is larger than memory. `HostCopy`: both sides are the CPU; tests of the
orchestrator use it where there is no GPU.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from fiddler.device import cuda_driver
from fiddler.device.c_functions import CFunctions, host_functions
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.semaphore import CudaSemaphore, HostSemaphore, Semaphore
from fiddler.errors import ResourceError

__all__ = ["BounceBufferCopy", "Event", "HostCopy", "PinnedCopy", "WeightCopy", "fastest_copy", "within"]

_FILLING_THREADS = 4
_BUFFER_BYTES = 1 << 24  # pinned
_BUFFERS = 4


class Event(Protocol):
    """A point in a stream, recorded again and again, as CUDA's events are."""

    def record(self) -> None:
        """Set the point after all work queued on the compute stream so far."""
        ...

    def wait(self) -> None:
        """Hold the compute stream until the point is reached."""
        ...

    def synchronize(self) -> None:
        """Hold the caller until the point is reached."""
        ...

    def query(self) -> bool:
        """Whether the point is reached."""
        ...


class WeightCopy(Protocol):
    """Copies weights, in order, while the compute stream works."""

    kind: str  # "pinned", "bounce" or "host": part of what a stored calibration holds for
    device: torch.device
    blocks: bool  # whether `copy` returns only when the copy is nearly done

    @property
    def stream(self) -> object:
        """Torch's stream of the copies; None where there is none."""
        ...

    def copy(self, target: int, source: int, row_bytes: int, rows: int = 1, pitch: int = 0) -> None:
        """Copy `rows` rows of `row_bytes` bytes from a mapping to `device`, packed there. target, source: addresses.

        pitch: distance of the rows' beginnings in the mapping [bytes].
        """
        ...

    def c_functions(self) -> CFunctions:
        """C functions for compiled code. Where `blocks`, they copy from pinned memory only."""
        ...

    def check(self, result: int) -> None:
        """Raise ResourceError unless a call of `c_functions` returned 0."""
        ...

    def event(self) -> Event:
        """A new event, reached already."""
        ...

    def semaphore(self) -> Semaphore:
        """A new semaphore, without waits so far."""
        ...

    def arrive(self, event: Event) -> None:
        """Record `event` after all copies so far."""
        ...

    def hold(self, event: Event) -> None:
        """Make all later copies wait for `event`."""
        ...


class _ReachedEvent:
    """An event that is always reached."""

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _view(address: int, row_bytes: int, rows: int, pitch: int) -> np.ndarray:
    """Bytes [rows, row_bytes] at an address."""
    extent = (rows - 1) * pitch + row_bytes
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(address))
    return np.lib.stride_tricks.as_strided(flat, (rows, row_bytes), (pitch, 1))


class HostCopy:
    """Copies on the CPU, within the call."""

    kind = "host"
    blocks = False
    stream = None

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def copy(self, target: int, source: int, row_bytes: int, rows: int = 1, pitch: int = 0) -> None:
        """Implements `WeightCopy.copy`."""
        np.copyto(_view(target, row_bytes, rows, row_bytes), _view(source, row_bytes, rows, pitch))

    def c_functions(self) -> CFunctions:
        """Implements `WeightCopy.c_functions`."""
        return host_functions()

    def check(self, result: int) -> None:
        """Implements `WeightCopy.check`."""
        assert result == 0

    def event(self) -> Event:
        """Implements `WeightCopy.event`."""
        return _ReachedEvent()

    def semaphore(self) -> Semaphore:
        """Implements `WeightCopy.semaphore`."""
        return HostSemaphore()

    def arrive(self, event: Event) -> None:
        """Implements `WeightCopy.arrive`."""

    def hold(self, event: Event) -> None:
        """Implements `WeightCopy.hold`."""


class _StreamCopy:
    """A CUDA stream for copies, and events in it and in the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def c_functions(self) -> CFunctions:
        """Implements `WeightCopy.c_functions`."""
        return CFunctions(*cuda_driver.c_addresses(), self.stream.cuda_stream)

    def check(self, result: int) -> None:
        """Implements `WeightCopy.check`."""
        cuda_driver.check_copy(result)

    def event(self) -> Event:
        """Implements `WeightCopy.event`."""
        return torch.cuda.Event()

    def semaphore(self) -> Semaphore:
        """Implements `WeightCopy.semaphore`."""
        return CudaSemaphore()

    def arrive(self, event: Event) -> None:
        """Implements `WeightCopy.arrive`."""
        assert isinstance(event, torch.cuda.Event)
        event.record(self.stream)

    def hold(self, event: Event) -> None:
        """Implements `WeightCopy.hold`."""
        assert isinstance(event, torch.cuda.Event)
        self.stream.wait_event(event)


class PinnedCopy(_StreamCopy):
    """The copy engine reads the pinned mapping."""

    kind = "pinned"
    blocks = False

    def __init__(self, device: torch.device, pinned: PinnedMapping) -> None:
        """Waits until the mapping is pinned. Raises ResourceError where it cannot be."""
        super().__init__(device)
        self._pinned = pinned  # its last reference unpins it
        pinned.wait()

    def c_functions(self) -> CFunctions:
        """Implements `WeightCopy.c_functions`."""
        return super().c_functions()._replace(borders=tuple(self._pinned.borders))

    def copy(self, target: int, source: int, row_bytes: int, rows: int = 1, pitch: int = 0) -> None:
        """Implements `WeightCopy.copy`."""
        stream, borders = self.stream.cuda_stream, self._pinned.borders
        if rows == 1 or pitch == row_bytes:  # in a microsecond where no border is in between, as almost always
            nbytes = row_bytes * rows
            if bisect_right(borders, source) == bisect_left(borders, source + nbytes):
                cuda_driver.copy_to_device(target, source, nbytes, stream)
                return
        for begin, count, size, offset in within(source, row_bytes, rows, pitch, borders):
            if count == 1 or pitch == size:
                cuda_driver.copy_to_device(target + offset, begin, size * count, stream)
            else:
                cuda_driver.copy_rows_to_device(target + offset, begin, size, count, pitch, stream)


def within(
    source: int, row_bytes: int, rows: int, pitch: int, borders: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Split a copy with the arguments of `WeightCopy.copy` into parts that cross none of the `borders`, in order.

    Yields of each part: source address, rows, bytes a row, and offset from the target's address [bytes].
    """
    if rows == 1 or pitch == row_bytes:
        begin, end = source, source + row_bytes * rows
        for border in [*borders[bisect_right(borders, begin) : bisect_left(borders, end)], end]:
            yield begin, 1, border - begin, begin - source
            begin = border
        return
    offset = 0
    while rows:
        index = bisect_right(borders, source)
        count = rows if index == len(borders) else min(rows, (borders[index] - source - row_bytes) // pitch + 1)
        if count > 0:
            yield source, count, row_bytes, offset
        else:  # this row crosses a border
            count = 1
            for begin, _, size, part_offset in within(source, row_bytes, 1, 0, borders):
                yield begin, 1, size, offset + part_offset
        source, rows, offset = source + count * pitch, rows - count, offset + count * row_bytes


class BounceBufferCopy(_StreamCopy):
    """Threads copy the mapping to pinned buffers; the copy engine reads those."""

    kind = "bounce"
    blocks = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._buffers = [torch.empty(_BUFFER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]
        self._free = [torch.cuda.Event() for _ in range(_BUFFERS)]  # reached when the buffer may be filled again
        self._next = 0
        self._threads = ThreadPoolExecutor(_FILLING_THREADS, "fiddler-copy")

    def copy(self, target: int, source: int, row_bytes: int, rows: int = 1, pitch: int = 0) -> None:
        """Implements `WeightCopy.copy`."""
        if rows == 1 or pitch == row_bytes:  # one long row: a buffer at a time
            total = row_bytes * rows
            for begin in range(0, total, _BUFFER_BYTES):
                self._copy(target + begin, source + begin, min(_BUFFER_BYTES, total - begin), 1, 0)
            return
        rows_per_buffer = _BUFFER_BYTES // row_bytes
        assert rows_per_buffer > 0, "a row is longer than a buffer"
        for begin in range(0, rows, rows_per_buffer):
            count = min(rows_per_buffer, rows - begin)
            self._copy(target + begin * row_bytes, source + begin * pitch, row_bytes, count, pitch)

    def _copy(self, target: int, source: int, row_bytes: int, rows: int, pitch: int) -> None:
        """Copy rows that fit into one buffer."""
        index, self._next = self._next, (self._next + 1) % _BUFFERS
        self._free[index].synchronize()
        address = self._buffers[index].data_ptr()
        mapped, buffer = _view(source, row_bytes, rows, pitch), _view(address, row_bytes, rows, row_bytes)
        axis = 1 if rows == 1 else 0
        cuts = np.linspace(0, mapped.shape[axis], _FILLING_THREADS + 1).astype(int)
        pieces = [np.s_[a:b] if axis == 0 else np.s_[:, a:b] for a, b in pairwise(cuts)]
        for future in [self._threads.submit(np.copyto, buffer[piece], mapped[piece]) for piece in pieces]:
            future.result()
        cuda_driver.copy_to_device(target, address, row_bytes * rows, self.stream.cuda_stream)
        self._free[index].record(self.stream)


def fastest_copy(pinned: PinnedMapping, device: torch.device, notify: Callable[[str], None]) -> WeightCopy:
    """The fastest copy that works: from the mapping itself where it fits into memory and the driver pins it."""
    try:
        return PinnedCopy(device, pinned)
    except ResourceError as error:
        notify(f"{error}: reading through buffers")
        return BounceBufferCopy(device)
