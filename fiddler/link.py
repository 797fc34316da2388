"""How weights get from a mapped file to where the GPU part computes. Knows arrays, tensors and streams; no models.

Three links, one interface. `DirectLink`: the mapping is registered, the GPU's copy engine reads it in place, at the
speed of the bus and without a thread of ours. `BouncedLink`: through pinned buffers that threads fill, where
registering is refused or the model is larger than memory. `HostLink`: both sides are the CPU; it is what the
orchestration is tested with where there is no GPU.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fiddler import cuda_driver

__all__ = ["BouncedLink", "DirectLink", "HostLink", "Link", "Mark"]

_FILLING_THREADS = 4
_BOUNCE = 1 << 24  # bytes of a pinned buffer
_BOUNCES = 4


class Mark(Protocol):
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


class Link(Protocol):
    """Copies weights, in order, beside what the compute stream does."""

    device: torch.device
    blocks: bool  # whether `copy` keeps its caller busy until the copy is nearly done

    def copy(self, target: Tensor, source: np.ndarray) -> None:
        """Rows source [r, n] of 16-bit values, n together but the rows perhaps apart -> target [r, n], contiguous."""
        ...

    def mark(self) -> Mark:
        """A new point, reached already."""
        ...

    def arrive(self, mark: Mark) -> None:
        """Set `mark` after all copies so far."""
        ...

    def hold(self, mark: Mark) -> None:
        """Copies from now on wait for `mark`."""
        ...


class _Passed:
    """A point that is always reached."""

    def record(self) -> None: ...

    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class HostLink:
    """Copies at once, on the CPU."""

    blocks = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def copy(self, target: Tensor, source: np.ndarray) -> None:
        """A `Link`'s."""
        np.copyto(target.view(torch.uint16).numpy(), source)

    def mark(self) -> Mark:
        """A `Link`'s."""
        return _Passed()

    def arrive(self, mark: Mark) -> None:
        """A `Link`'s."""

    def hold(self, mark: Mark) -> None:
        """A `Link`'s."""


class _CudaLink:
    """A stream for copies, and points in it and in the compute stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Mark:
        """A `Link`'s."""
        return torch.cuda.Event()

    def arrive(self, mark: Mark) -> None:
        """A `Link`'s."""
        assert isinstance(mark, torch.cuda.Event)
        mark.record(self._stream)

    def hold(self, mark: Mark) -> None:
        """A `Link`'s."""
        assert isinstance(mark, torch.cuda.Event)
        self._stream.wait_event(mark)


class DirectLink(_CudaLink):
    """The copy engine reads the registered mapping."""

    blocks = False

    def copy(self, target: Tensor, source: np.ndarray) -> None:
        """A `Link`'s."""
        stream = self._stream.cuda_stream
        if source.strides[0] == source.shape[1] * 2:
            cuda_driver.copy_to_device(target.data_ptr(), source.ctypes.data, source.nbytes, stream)
            return
        rows, width = source.shape
        cuda_driver.copy_rows_to_device(
            target.data_ptr(), source.ctypes.data, width * 2, rows, source.strides[0], stream
        )


class BouncedLink(_CudaLink):
    """Threads copy the mapping to pinned buffers, the copy engine reads those."""

    blocks = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._buffers = [torch.empty(_BOUNCE // 2, dtype=torch.uint16, pin_memory=True) for _ in range(_BOUNCES)]
        self._left = [torch.cuda.Event() for _ in range(_BOUNCES)]  # reached when a buffer may be filled again
        self._next = 0
        self._threads = ThreadPoolExecutor(_FILLING_THREADS, "fiddler-link")

    def copy(self, target: Tensor, source: np.ndarray) -> None:
        """A `Link`'s."""
        width = source.shape[1]
        most = max(1, _BOUNCE // 2 // width)
        assert width * 2 <= _BOUNCE
        for begin in range(0, len(source), most):
            part = source[begin : begin + most]
            index, self._next = self._next, (self._next + 1) % _BOUNCES
            self._left[index].synchronize()
            buffer = self._buffers[index].numpy()[: part.size].reshape(part.shape)
            cuts = np.linspace(0, len(part), _FILLING_THREADS + 1).astype(int)
            pieces = [(buffer[a:b], part[a:b]) for a, b in pairwise(cuts)]
            for done in [self._threads.submit(np.copyto, *piece) for piece in pieces]:
                done.result()
            cuda_driver.copy_to_device(
                target.data_ptr() + begin * width * 2, buffer.ctypes.data, part.nbytes, self._stream.cuda_stream
            )
            self._left[index].record(self._stream)
