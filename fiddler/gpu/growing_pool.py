"""A pool of blocks of keys and values on a GPU, which grows and shrinks. Knows bytes; no experts.

Block tables hold offsets from the begin of the pool's first memory, so that kernels, and graphs that captured its
address, reach whatever is added later.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify
from weakref import ref

import torch

from fiddler.models.config import Config
from fiddler.runtime.block_pool import POSITIONS, Block, BlockPool, block_bytes
from fiddler.runtime.row_layout import PlanarRows, RowLayout

__all__ = ["SEGMENT_BYTES", "GrowingPool"]

SEGMENT_BYTES = 1 << 26
"""By which the pool grows, or a block where that is larger."""


class GrowingPool(BlockPool):
    """A `BlockPool` that begins with `least` blocks, which it always has.

    Q8_0 lies in it as Triton's kernels read it: `PlanarRows`.
    """

    object_bytes = 184  # a weak reference to each block, too

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        least: int,
        read_as: torch.dtype | None = None,
    ) -> None:
        """dtype, read_as: see `RowLayout`."""
        layout = (PlanarRows if dtype == torch.uint8 else RowLayout).of(config.head_dim, dtype, read_as)
        super().__init__(config, dtype, device, least, layout)
        self.array = None  # not all of it, where tests put the CPU in the GPU's place
        self.room: Callable[[], int] = lambda: 0
        """Bytes by which the pool may grow now."""
        self.displaceable: Callable[[], int] = lambda: 0
        """Bytes that others should give up for sequences; they give more where nothing else helps."""
        self.make_room: Callable[[int], bool] = lambda nbytes: False
        """Lets others give up memory until there is room for so many bytes; returns whether there is."""
        self._block_bytes = block_bytes(config, dtype)
        self._live: list[ref[Block]] = []  # by number, those in use and some that were
        self._by = max(1, SEGMENT_BYTES // self._block_bytes)  # blocks of a segment

    @property
    def segment_bytes(self) -> int:
        """Bytes by which the pool grows."""
        return self._by * self._block_bytes

    @property
    def max_bytes(self) -> int:
        """Size that the pool should have at most: what it has, the room to grow, and what others give up [bytes]."""
        more = max(0, self.room()) + self.displaceable()
        return self.capacity * self._block_bytes + more // self.segment_bytes * self.segment_bytes

    def grow(self) -> bool:
        """Implements `BlockPool.grow`."""
        if self.room() < self.segment_bytes:
            return False
        try:
            with torch.inference_mode(False):  # else nothing but inference could write to it
                segment = torch.empty(self._by, *self.memory.shape[1:], dtype=self.memory.dtype, device=self.device)
        except torch.OutOfMemoryError:  # the room is in pieces
            return False
        self._append(segment)
        self.capacity += self._by
        return True

    def displace(self) -> bool:
        """Implements `BlockPool.displace`."""
        return self.make_room(self.segment_bytes) and self.grow()

    def below(self, nbytes: int) -> int | None:
        """Number of the first block of the last segments that have so many bytes; None where that were all of it."""
        count = -(-nbytes // self.segment_bytes)
        return self._firsts[-count] if count < len(self._firsts) else None

    def take(self) -> Block:
        """Implements `BlockPool.take`."""
        block = super().take()
        self._live[block.number : block.number + 1] = [ref(block)]  # the first of all, or the next one
        return block

    def shrink(self, number: int) -> bool:
        """Free the segments from block `number` on, a first one; whether that worked.

        Blocks in use there move below; past sequences that do not fit are forgotten.
        """
        assert number in self._firsts[1:]
        while self.used > number:
            if not self.reclaim():
                return False
        self._move_below(number)
        del self._live[number:]
        index = self._firsts.index(number)
        del self._firsts[index:], self.segments[index:]
        self.offsets = self.offsets[:number]
        self._free[:] = [free for free in self._free if free < number]
        heapify(self._free)
        self._fresh, self.capacity = min(self._fresh, number), number
        return True

    def _move_below(self, number: int) -> None:
        """Move blocks from this number on to free ones below, of which there are enough."""
        high = [block for each in self._live[number:] if (block := each()) is not None]
        for block in high:
            target = super().take()
            assert target.number < number, "the first free block is taken"
            self.copy(block, target, POSITIONS)
            block.number, target.number = target.number, block.number
            self._live[block.number] = ref(block)
        self.moves += len(high)
