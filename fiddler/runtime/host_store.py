"""Blocks of a pool on a GPU that others needed, in host memory until their sequence goes on. Knows bytes; no tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from heapq import heappop

import torch
from torch import Tensor

from fiddler.host_memory import available_memory, memory_for_sequences
from fiddler.runtime.block_pool import Block, BlockPool
from fiddler.runtime.resume_costs import ResumeCosts

__all__ = ["HostStore", "host_store_bytes"]

_SEGMENT_BYTES = 1 << 26  # by which it grows; torch rounds pinned memory up to a power of two
_MOST_BYTES = 1 << 33
_PART = 0.5  # of the memory for sequences that is there when the model is loaded


class HostStore:
    """Memory for up to `capacity` blocks, taken from the system as they come; pinned where the pool is on a GPU.

    `saves`, `loads`: blocks that were copied to it, and back, so far.
    """

    def __init__(self, pool: BlockPool, nbytes: int, costs: ResumeCosts) -> None:
        """nbytes: the most memory. costs: receives the seconds of each copy, and decides by them."""
        self._pool, self._costs = pool, costs
        self._block_bytes = pool.memory[0].nbytes
        self.capacity = nbytes // self._block_bytes
        self.saves = self.loads = 0
        self._by = max(1, _SEGMENT_BYTES // self._block_bytes)  # blocks of a segment
        self._segments: list[Tensor] = []  # [blocks, *a block's shape]
        self._there = self._fresh = 0  # blocks in segments; blocks from the second number on were never taken
        self._free: list[int] = []

    @property
    def used(self) -> int:
        """Blocks that are stored."""
        return self._fresh - len(self._free)

    @property
    def nbytes(self) -> int:
        """Memory that it has taken so far [bytes]."""
        return self._there * self._block_bytes

    def pays(self, blocks: int, positions: int) -> bool:
        """Whether copying so many blocks takes less time than computing their positions again."""
        return self._costs.copy_pays(blocks * self._block_bytes, positions)

    def save(self, block: Block) -> Block | None:
        """Copy a block of the pool; free again when nobody refers to the result. None where no memory is left."""
        if self._free:
            stored = Block(heappop(self._free), self._free)
        elif self._fresh < self._there or self._grow():
            self._fresh += 1
            stored = Block(self._fresh - 1, self._free)
        else:
            return None
        self._copy([(self._pool.view(block), self._view(stored))])
        self.saves += 1
        return stored

    def load(self, pairs: Sequence[tuple[Block, Block]]) -> None:
        """Copy stored blocks to blocks of the pool."""
        self._copy([(self._view(stored), self._pool.view(target)) for stored, target in pairs])
        self.loads += len(pairs)

    def _copy(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Copy each first to its second within the call, and note the time."""
        began = self._now()
        for source, target in pairs:
            target.copy_(source, non_blocking=True)
        self._costs.copied(len(pairs) * self._block_bytes, self._now() - began)

    def _now(self) -> float:
        """The time after all that is queued on the GPU [s]."""
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
        return time.perf_counter()

    def _grow(self) -> bool:
        """Take a segment more from the system; where it gives none, the store stays as large as it is."""
        count = min(self._by, self.capacity - self._there)
        if count <= 0:
            return False
        first, pinned = self._pool.memory, self._pool.device.type == "cuda"
        try:
            with torch.inference_mode(False):  # else nothing but inference could write to it
                segment = torch.empty(count, *first.shape[1:], dtype=first.dtype, pin_memory=pinned)
        except RuntimeError:  # torch's error where the system or the driver gives no memory
            self.capacity = self._there
            return False
        self._segments.append(segment)
        self._there += count
        return True

    def _view(self, stored: Block) -> Tensor:
        return self._segments[stored.number // self._by][stored.number % self._by]


def host_store_bytes(weights: int) -> int:
    """The most memory of a store beside `weights` bytes of a mapped file: half of that for sequences, at most 8 GiB."""
    return min(_MOST_BYTES, int(_PART * (memory_for_sequences(available_memory(), weights) or 0)))
