"""Numbers in pinned memory by which the threads and the streams of a step of single tokens wait for each other.

Knows numbers and the current stream; not the work between them. See `kernels.one_token.Signal`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch

from fiddler.device import cuda_driver
from fiddler.errors import ResourceError
from fiddler.kernels.machine.signals import SIGNAL_STRIDE
from fiddler.kernels.one_token import Signal

__all__ = ["Place", "TokenSignals"]


class Place(NamedTuple):
    """Where a signal lies, and the number of a layer, or of one of its chunks, from that of a step's first layer."""

    address: int
    times: int  # the number is that of the first layer, so many times,
    plus: int  # and this, modulo 2**32


class TokenSignals:
    """The signals of one model's decode steps. Numbers are compared modulo 2**32.

    Each layer with missing experts has a number, one more than the layer before it, in this step or the last one; its
    chunks have the numbers that `TokenCopies` says.
    """

    def __init__(self, chunks: int = 1, *, pinned: bool) -> None:
        """chunks: of a layer's streamed experts. pinned: the streams of a GPU use them, too."""
        self.first = 1
        """The number of the step's first layer with missing experts."""
        self.running = False
        """Whether a step has begun, and not ended."""
        self.ended = False
        """Whether the last step ended as it should, and none of several tokens has begun since then."""
        self._next, self._chunks = 1, chunks
        self._memory = torch.zeros(len(Signal) * SIGNAL_STRIDE, dtype=torch.int32, pin_memory=pinned)
        self.numbers = self._memory.numpy().view(np.uint32)
        """uint32 [len(Signal) * SIGNAL_STRIDE], for compiled code."""

    def begin(self, layers: int) -> int:
        """Begin a step with so many layers with missing experts; no thread sends copies yet. Returns `first`."""
        self.first, self._next = self._next, self._next + layers
        self.set(Signal.SENDING, 0)
        self.set(Signal.STOPPED, 0)
        self.running, self.ended = True, False
        return self.first

    @property
    def next(self) -> int:
        """The number of the first layer of the next step."""
        return self._next

    def skip_to(self, number: int) -> None:
        """Leave out the numbers before this one: a step that was begun for nothing has used some."""
        self._next = max(self._next, number)

    def stop(self) -> None:
        """Let the thread that sends end soon, if a step has begun: it is broken off."""
        if self.running:
            self.set(Signal.STOPPED, 1)

    def end(self) -> None:
        """End a step whose last layer has its sum."""
        self.running, self.ended = False, True

    def release(self) -> None:
        """End a step that was broken off: let the GPU pass all its waits. No copies are under way any more."""
        self.set(Signal.SENT, self.chunk(self._next - 1, self._chunks - 1))
        self.set(Signal.SUMMED, self._next - 1)
        self.running = False

    def chunk(self, number: int, chunk: int) -> int:
        """The number of a chunk of the layer with this number."""
        return number * self._chunks + chunk

    def place(self, signal: Signal, index: int) -> Place:
        """A signal and the number of the layer with missing experts that has `index` 0 and so on in each step."""
        return Place(self._address(signal), 1, index)

    def place_of_chunk(self, signal: Signal, index: int, chunk: int) -> Place:
        """A signal and the number of a chunk of that layer."""
        return Place(self._address(signal), self._chunks, self.chunk(index, chunk))

    @staticmethod
    def can_wait() -> bool:
        """Whether a stream may wait for a number that another stream writes, or the host.

        The driver must be able to, and the environment must not put all streams into one queue, nor let each kernel's
        launch wait for its end.
        """
        if os.environ.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
            return False
        if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            return False
        works = TokenSignals(pinned=True)._wait(Signal.SUMMED, 0)
        torch.cuda.current_stream().synchronize()  # it reads this memory
        return works

    def wait(self, signal: Signal, number: int) -> None:
        """Hold the current stream until a signal is `number` or later."""
        if not self._wait(signal, number):
            raise ResourceError("the driver no longer lets the GPU wait for the CPU; use --device cpu")

    def write(self, signal: Signal, number: int) -> None:
        """Set a signal when the current stream has done its work so far."""
        stream = torch.cuda.current_stream().cuda_stream
        cuda_driver.write_value(stream, self._address(signal), number & 0xFFFFFFFF)

    def set(self, signal: Signal, number: int) -> None:
        """Set a signal at once."""
        self.numbers[signal * SIGNAL_STRIDE] = number & 0xFFFFFFFF

    def is_at(self, signal: Signal, number: int) -> bool:
        """Whether a signal is `number` or later."""
        return (int(self.numbers[signal * SIGNAL_STRIDE]) - number) & 0xFFFFFFFF < 1 << 31

    def _wait(self, signal: Signal, number: int) -> bool:
        stream = torch.cuda.current_stream().cuda_stream
        return cuda_driver.wait_for_value(stream, self._address(signal), number & 0xFFFFFFFF)

    def _address(self, signal: Signal) -> int:
        return self._memory.data_ptr() + 4 * SIGNAL_STRIDE * signal
