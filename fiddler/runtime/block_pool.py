"""A pool of blocks of keys and values, which sequences share (vLLM, https://arxiv.org/abs/2309.06180). Knows no model.

A block holds keys and values of `POSITIONS` consecutive positions of every layer. Python's references to a `Block` say
how long it lives: with the last of them it is free again, whatever broke off in between.
"""

from __future__ import annotations

import math
import mmap
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiddler.errors import ResourceError
from fiddler.models.config import Config
from fiddler.runtime.row_layout import POSITIONS, RowLayout

__all__ = ["POSITIONS", "UNIT_BYTES", "Block", "BlockPool", "Places", "array_dtype", "block_bytes", "blocks_for"]

UNIT_BYTES = 64  # a block's size, and the address of each allocation, are multiples of it
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: no swap is set aside; named since Python 3.13
_NUMPY = {torch.float16: np.uint16, torch.float32: np.float32, torch.uint8: np.uint8}


class Block:
    """A block of a pool; free again when nobody refers to it. Its holders count themselves in `holders`.

    Only a block with a single holder may be written.
    """

    __slots__ = ("__weakref__", "_free", "holders", "number")

    def __init__(self, number: int, free: list[int]) -> None:
        self.number, self.holders, self._free = number, 0, free

    def __del__(self) -> None:
        heappush(self._free, self.number)


class Places(NamedTuple):
    """Rows of blocks of one segment: numbers within the segment and rows, int64 [n]; `news`: which ones of all places.

    `news` is None where this segment has all of them.
    """

    segment: Tensor
    numbers: Tensor
    rows: Tensor
    news: Tensor | None


class BlockPool:
    """`capacity` blocks at most. On the CPU, memory is taken from the system as blocks are first written.

    `segments`: the memory, each [blocks, L, M, G, *layout.shape], M: keys and values, or, of latent attention, one
    vector that is both. `layout`: what is in the memory of a head's `POSITIONS` rows. `memory`: the first segment.
    `array`: the memory as our kernels take it, float16 as its bits, where it is all on the CPU; else None.
    `offsets`: int64, by a block's number: where it begins, in units of `UNIT_BYTES` from the begin of the pool.
    """

    object_bytes = 96
    """Host memory of a `Block` and its number, and of what the pool refers to it by, as measured [bytes]."""

    def __init__(
        self,
        config: Config,
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        layout: RowLayout | None = None,
    ) -> None:
        """layout: of rows of this dtype; None: that of our kernels on the CPU.

        Raises ResourceError where the system does not give the addresses of a single block.
        """
        self.layout = layout or RowLayout.of(config.head_dim, dtype)
        shape = (*_heads(config), *self.layout.shape)
        self.array: np.ndarray | None = None
        if device.type == "cpu":
            nbytes = block_bytes(config, dtype)
            region, capacity = _address_space(nbytes, capacity)
            array = np.frombuffer(region, _NUMPY[dtype], capacity * nbytes // dtype.itemsize)
            self.array = array.reshape(capacity, *shape)
            self.memory = torch.from_numpy(self.array).view(dtype)
        else:
            self.memory = torch.empty(capacity, *shape, dtype=dtype, device=device)
        self.segments: list[Tensor] = []
        self.offsets = np.empty(0, np.int64)
        self._firsts: list[int] = []  # number of each segment's first block
        self._append(self.memory)
        self.capacity, self.device = capacity, device
        self.reclaim: Callable[[], bool] = lambda: False
        """Frees a block that nobody computes with, and returns whether there was one; called where none is free."""
        self._free: list[int] = []
        self._fresh = 0  # blocks from this number on were never taken
        self.moves = 0
        """Counts moves of blocks, whose numbers have changed then."""

    @property
    def available(self) -> int:
        """Blocks that can be taken without reclaiming any."""
        return max(0, self.capacity - self.used)

    @property
    def max_bytes(self) -> int:
        """Size that the pool may have now [bytes]."""
        return self.capacity * self.memory[0].nbytes

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return self._fresh - len(self._free)

    @property
    def taken_bytes(self) -> int:
        """Memory of the blocks that were ever taken [bytes]: on the CPU that which the system has given."""
        return self._fresh * self.memory[0].nbytes

    def take(self) -> Block:
        """The first free block, with whatever it held before. Raises ResourceError where there is none."""
        while not self.available and (self.grow() or self.reclaim() or self.displace()):
            continue
        if not self.available:
            raise ResourceError(
                f"the {self.capacity} blocks of the KV cache are in use; give shorter prompts, or fewer at once"
            )
        if self._free:
            return Block(heappop(self._free), self._free)
        self._fresh += 1
        return Block(self._fresh - 1, self._free)

    def grow(self) -> bool:
        """Raise the capacity, where there is more memory; returns whether it did."""
        return False

    def displace(self) -> bool:
        """`grow`, where other things of less value give their memory."""
        return False

    def copy(self, source: Block, target: Block, positions: int) -> None:
        """Copy a block's first `positions` of all layers to another block."""
        self.layout.copy(self.view(source), self.view(target), positions)

    def view(self, block: Block) -> Tensor:
        """A block's memory, [L, M, G, *layout.shape]."""
        segment = bisect_right(self._firsts, block.number) - 1
        return self.segments[segment][block.number - self._firsts[segment]]

    def places(self, numbers: np.ndarray, rows: np.ndarray) -> list[Places]:
        """Where rows of blocks lie, int64 [n] each; on the pool's device, for `store` of each layer."""
        device, places = self.device, []
        for segment, chosen in self._by_segment(numbers):
            local = torch.from_numpy(numbers[chosen] - self._firsts[segment]).to(device)
            own = torch.from_numpy(rows[chosen]).to(device)
            news = None if len(chosen) == len(numbers) else torch.from_numpy(chosen).to(device)
            places.append(Places(self.segments[segment], local, own, news))
        return places

    def store(self, layer: int, places: Sequence[Places], memories: Sequence[Tensor]) -> None:
        """Write a layer's keys and values [n, G, head_dim] to n places; of latent attention, the keys alone."""
        for segment, numbers, rows, news in places:
            for memory, new in zip(range(segment.shape[2]), memories, strict=False):
                self.layout.store(segment[:, layer, memory], numbers, rows, new if news is None else new[news])

    def blocks(self, layer: int, memory: int, numbers: np.ndarray) -> Tensor:
        """A layer's keys or values of n blocks: a copy, [G, n, POSITIONS, head_dim], float32 where they are Q8_0."""
        device, parts, order = self.device, [], []
        for segment, chosen in self._by_segment(numbers):
            local = torch.from_numpy(numbers[chosen] - self._firsts[segment]).to(device)
            parts.append(self.segments[segment][:, layer, memory].transpose(0, 1)[:, local])
            order.append(chosen)
        stored = parts[0]
        if len(parts) > 1:
            stored = torch.cat(parts, 1)[:, torch.from_numpy(np.argsort(np.concatenate(order))).to(device)]
        return self.layout.load(stored)

    def _append(self, segment: Tensor) -> None:
        """Add memory behind the last block."""
        nbytes, begin = segment[0].numel() * segment.itemsize, segment.data_ptr() - self.memory.data_ptr()
        assert begin % UNIT_BYTES == nbytes % UNIT_BYTES == 0
        offsets = (begin + np.arange(len(segment), dtype=np.int64) * nbytes) // UNIT_BYTES
        self._firsts.append(len(self.offsets))
        self.offsets = np.concatenate([self.offsets, offsets])
        self.segments.append(segment)

    def _by_segment(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """The segments that hold these blocks, and which of the blocks each holds: indices into `numbers`."""
        if len(self.segments) == 1:
            yield 0, np.arange(len(numbers))
            return
        segments = np.searchsorted(np.array(self._firsts), numbers, "right") - 1
        for segment in np.unique(segments).tolist():
            yield segment, np.flatnonzero(segments == segment)


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions of one sequence."""
    return -(-positions // POSITIONS)


def array_dtype(dtype: torch.dtype) -> np.dtype:
    """The type of `BlockPool.array` for keys and values of this type."""
    return np.dtype(_NUMPY[dtype])


def block_bytes(config: Config, dtype: torch.dtype) -> int:
    """Size of a block [bytes]."""
    return math.prod(_heads(config)) * RowLayout.of(config.head_dim, dtype).nbytes


def _heads(config: Config) -> tuple[int, int, int]:
    """L, M and G of a pool's memory."""
    return config.block_count, 2 if config.latent is None else 1, config.head_count_kv


def _address_space(nbytes: int, capacity: int) -> tuple[mmap.mmap, int]:
    """Memory for up to `capacity` blocks of `nbytes`, not yet backed by any; fewer where addresses are limited."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    while capacity > 0:
        try:
            return mmap.mmap(-1, capacity * nbytes, flags=flags), capacity
        except (OSError, OverflowError, MemoryError):
            capacity //= 2
    raise ResourceError(f"out of memory: no room for {nbytes} bytes of keys and values; close other programs")
