"""How weights get from a mapped file to where the GPU part computes. Knows addresses and streams; no models.

Three links, one interface. `PinnedCopy`: the mapping is registered, the GPU's copy engine reads it in place, at the
speed of the bus and without a thread of ours. `BounceBufferCopy`: through pinned buffers that threads fill, where
registering is refused or the model is larger than memory. `HostCopy`: both sides are the CPU; it is what the
orchestration is tested with where there is no GPU.
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
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.semaphore import CudaSemaphore, HostSemaphore, Semaphore
from fiddler.errors import ResourceError

__all__ = ["BounceBufferCopy", "Event", "HostCopy", "PinnedCopy", "WeightCopy", "fastest_copy", "within"]

_FILLING_THREADS = 4
_BOUNCE = 1 << 24  # bytes of a pinned buffer
_BOUNCES = 4


class Event(Protocol):
    """A point in a queue of work, set again and again, as CUDA's events are."""

    def record(self) -> None:
        """The point is after all that the compute stream was given so far."""
        ...

    def wait(self) -> None:
        """The compute stream goes on only when the point is reached."""
        ...

    def synchronize(self) -> None:
        """The caller goes on only when the point is reached."""
        ...

    def query(self) -> bool:
        """Whether it is reached."""
        ...


class WeightCopy(Protocol):
    """Copies weights, in order, beside what the compute stream does."""

    device: torch.device
    blocks: bool  # whether `copy` keeps its caller busy until the copy is nearly done

    @property
    def stream(self) -> object:
        """Torch's stream in which the copies are; None where there is none."""
        ...

    def copy(self, target: int, source: int, width: int, rows: int = 1, pitch: int = 0) -> None:
        """Copy `rows` rows of `width` bytes, which begin `pitch` bytes apart at the address `source` in a mapping.

        At the address `target` on `device` they come to lie side by side.
        """
        ...

    def event(self) -> Event:
        """A new point, reached already."""
        ...

    def semaphore(self) -> Semaphore:
        """A new gate, open so far."""
        ...

    def arrive(self, event: Event) -> None:
        """Set `event` after all copies so far."""
        ...

    def hold(self, event: Event) -> None:
        """Copies from now on wait for `event`."""
        ...


class _ReachedEvent:
    """A point that is always reached."""

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _view(address: int, width: int, rows: int, pitch: int) -> np.ndarray:
    """Bytes [rows, width] at an address."""
    extent = (rows - 1) * pitch + width
    flat = np.ctypeslib.as_array((ctypes.c_uint8 * extent).from_address(address))
    return np.lib.stride_tricks.as_strided(flat, (rows, width), (pitch, 1))


class HostCopy:
    """Copies at once, on the CPU."""

    blocks = False
    stream = None

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def copy(self, target: int, source: int, width: int, rows: int = 1, pitch: int = 0) -> None:
        """A `WeightCopy`'s."""
        np.copyto(_view(target, width, rows, width), _view(source, width, rows, pitch))

    def event(self) -> Event:
        """A `WeightCopy`'s."""
        return _ReachedEvent()

    def semaphore(self) -> Semaphore:
        """A `WeightCopy`'s."""
        return HostSemaphore()

    def arrive(self, event: Event) -> None:
        """A `WeightCopy`'s."""

    def hold(self, event: Event) -> None:
        """A `WeightCopy`'s."""


class _StreamCopy:
    """A stream for copies, and points in it and in the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def event(self) -> Event:
        """A `WeightCopy`'s."""
        return torch.cuda.Event()

    def semaphore(self) -> Semaphore:
        """A `WeightCopy`'s."""
        return CudaSemaphore()

    def arrive(self, event: Event) -> None:
        """A `WeightCopy`'s."""
        assert isinstance(event, torch.cuda.Event)
        event.record(self.stream)

    def hold(self, event: Event) -> None:
        """A `WeightCopy`'s."""
        assert isinstance(event, torch.cuda.Event)
        self.stream.wait_event(event)


class PinnedCopy(_StreamCopy):
    """The copy engine reads the registered mapping."""

    blocks = False

    def __init__(self, device: torch.device, pinned: PinnedMapping) -> None:
        """Raises ResourceError where the mapping cannot be registered."""
        super().__init__(device)
        self._pinned = pinned  # which goes with the last who holds it
        pinned.wait()

    def copy(self, target: int, source: int, width: int, rows: int = 1, pitch: int = 0) -> None:
        """A `WeightCopy`'s."""
        stream, borders = self.stream.cuda_stream, self._pinned.borders
        for begin, count, size, to in within(source, width, rows, pitch, borders):
            if count == 1 or pitch == size:
                cuda_driver.copy_to_device(target + to, begin, size * count, stream)
            else:
                cuda_driver.copy_rows_to_device(target + to, begin, size, count, pitch, stream)


def within(
    source: int, width: int, rows: int, pitch: int, borders: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """The parts of such a copy as `WeightCopy.copy` makes, none of which goes past one of the `borders`, in order.

    Of each: its address, rows, bytes a row, and how far after the target's address it goes.
    """
    if rows == 1 or pitch == width:
        begin, end = source, source + width * rows
        for border in [*borders[bisect_right(borders, begin) : bisect_left(borders, end)], end]:
            yield begin, 1, border - begin, begin - source
            begin = border
        return
    to = 0
    while rows:
        place = bisect_right(borders, source)
        fit = rows if place == len(borders) else min(rows, (borders[place] - source - width) // pitch + 1)
        if fit > 0:
            yield source, fit, width, to
        else:  # a row that lies on both sides of a border
            fit = 1
            for begin, _, size, after in within(source, width, 1, 0, borders):
                yield begin, 1, size, to + after
        source, rows, to = source + fit * pitch, rows - fit, to + fit * width


class BounceBufferCopy(_StreamCopy):
    """Threads copy the mapping to pinned buffers, the copy engine reads those."""

    blocks = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._buffers = [torch.empty(_BOUNCE, dtype=torch.uint8, pin_memory=True) for _ in range(_BOUNCES)]
        self._left = [torch.cuda.Event() for _ in range(_BOUNCES)]  # reached when a buffer may be filled again
        self._next = 0
        self._threads = ThreadPoolExecutor(_FILLING_THREADS, "fiddler-link")

    def copy(self, target: int, source: int, width: int, rows: int = 1, pitch: int = 0) -> None:
        """A `WeightCopy`'s."""
        if rows == 1 or pitch == width:  # one long row, in pieces of a buffer
            total = width * rows
            for begin in range(0, total, _BOUNCE):
                self._copy(target + begin, source + begin, min(_BOUNCE, total - begin), 1, 0)
            return
        most = _BOUNCE // width
        assert most > 0, "a row is longer than a buffer"
        for begin in range(0, rows, most):
            count = min(most, rows - begin)
            self._copy(target + begin * width, source + begin * pitch, width, count, pitch)

    def _copy(self, target: int, source: int, width: int, rows: int, pitch: int) -> None:
        """What fits into a buffer."""
        index, self._next = self._next, (self._next + 1) % _BOUNCES
        self._left[index].synchronize()
        address = self._buffers[index].data_ptr()
        given, buffer = _view(source, width, rows, pitch), _view(address, width, rows, width)
        axis = 1 if rows == 1 else 0
        cuts = np.linspace(0, given.shape[axis], _FILLING_THREADS + 1).astype(int)
        pieces = [np.s_[a:b] if axis == 0 else np.s_[:, a:b] for a, b in pairwise(cuts)]
        for done in [self._threads.submit(np.copyto, buffer[piece], given[piece]) for piece in pieces]:
            done.result()
        cuda_driver.copy_to_device(target, address, width * rows, self.stream.cuda_stream)
        self._left[index].record(self.stream)


def fastest_copy(pinned: PinnedMapping, device: torch.device, notify: Callable[[str], None]) -> WeightCopy:
    """The fastest link there is: the mapping itself, where it fits into memory and may be registered."""
    try:
        return PinnedCopy(device, pinned)
    except ResourceError as error:
        notify(f"{error}: reading through buffers")
        return BounceBufferCopy(device)
