"""A pool of blocks of keys and values on a GPU, which grows as long as the budget has room. Knows bytes; no experts.

Block tables hold offsets from the begin of the pool's first memory, so that kernels, and graphs that captured its
address, reach whatever is added later.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fiddler.models.config import Config
from fiddler.runtime.block_pool import BlockPool, block_bytes

__all__ = ["GrowingPool"]

_SEGMENT_BYTES = 1 << 26  # by which it grows


class GrowingPool(BlockPool):
    """A `BlockPool` that begins with `least` blocks, which it always has."""

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, least: int) -> None:
        super().__init__(config, dtype, device, least)
        self.array = None  # not all of it, where tests put the CPU in the GPU's place
        self.room: Callable[[], int] = lambda: 0
        """Bytes by which the pool may grow now."""
        self._block_bytes = block_bytes(config, dtype)
        self._by = max(1, _SEGMENT_BYTES // self._block_bytes)  # blocks of a segment

    @property
    def max_bytes(self) -> int:
        """Size that the pool may have now: what it has, and the room to grow [bytes]."""
        segment = self._by * self._block_bytes
        return self.capacity * self._block_bytes + max(0, self.room()) // segment * segment

    def grow(self) -> bool:
        """Implements `BlockPool.grow`."""
        if self.room() < self._by * self._block_bytes:
            return False
        try:
            with torch.inference_mode(False):  # else nothing but inference could write to it
                segment = torch.empty(self._by, *self.memory.shape[1:], dtype=self.memory.dtype, device=self.device)
        except torch.OutOfMemoryError:  # the room is in pieces
            return False
        self._append(segment)
        self.capacity += self._by
        return True
