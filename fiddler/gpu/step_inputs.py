"""What a captured decode step reads: a token, its position and its block table, and the number of its first signal.

Knows their memory on the host and on the GPU; not what is computed from them.
"""

from __future__ import annotations

import numpy as np
import torch

from fiddler.device import cuda_driver
from fiddler.gpu.capture import captured
from fiddler.offload.host_read_kernels import numbers_from_host

__all__ = ["StepInputs"]

_BEFORE = 2  # numbers before the token id: that of the first signal, and one that keeps the token at 16 bytes


class StepInputs:
    """Fixed memory on both sides, and a graph that copies from the host to the GPU."""

    def __init__(self, blocks: int, device: torch.device) -> None:
        """blocks: the most of a block table."""
        size = _BEFORE + 2 + blocks
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=True).numpy()
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self.first, self.token = self._device[:1], self._device[_BEFORE:]
        """int64 [1], the number of the first layer with missing experts; int64: token id, position, block table."""
        self._table = self._host[_BEFORE + 2 :]
        self._copied, self._recorded = torch.cuda.Event(), False  # whether it was recorded since somebody waited
        self._queued = False  # whether a copy is queued that nobody knows to have ended
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """Queue the copy to the GPU."""
        numbers_from_host(self._host.ctypes.data, self._device)

    def capture(self, pool: torch.cuda._POOL_HANDLE) -> None:
        """Capture that copy, with memory from `pool`, after a `run`."""
        with captured(pool) as self._graph:
            self.run()

    def advance(self, layers: int) -> None:
        """Queue that `first` becomes that of the next step."""
        self.first.add_(layers)

    def queue(self, first: int, token: int, position: int, table: np.ndarray) -> None:
        """Queue the captured copy of these; then call `copied`, or `were_read`. table: int64, at most `blocks`."""
        assert self._graph is not None, "it is captured first"
        if self._queued:  # the step was broken off
            torch.cuda.current_stream().synchronize()
        self._wait()
        self._host[0] = first
        self._host[_BEFORE : _BEFORE + 2] = token, position
        self._table[: len(table)] = table
        self._queued = True
        self._graph.replay()

    def queue_table(self, table: np.ndarray) -> None:
        """Queue the copy of this block table, unless it is there: the token and its position are the GPU's."""
        if np.array_equal(self._table[: len(table)], table):
            return
        self._wait()
        self._queued = True
        self._table[: len(table)] = table
        skipped = 8 * (_BEFORE + 2)
        target, source = self._device.data_ptr() + skipped, self._host.ctypes.data + skipped
        cuda_driver.copy_to_device(target, source, 8 * len(table), torch.cuda.current_stream().cuda_stream)
        self.copied()

    def copied(self) -> None:
        """Keep the host's memory as it is until all that is queued so far has ended."""
        self._copied.record()
        self._recorded, self._queued = True, False

    def were_read(self) -> None:
        """Say that the GPU has read what `queue` queued, as later signals show."""
        self._queued = False

    def _wait(self) -> None:
        """Wait until the host's memory may change."""
        if self._recorded:
            self._copied.synchronize()
            self._recorded = False
