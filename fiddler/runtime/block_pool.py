"""A pool of blocks of keys and values, which sequences share (vLLM, https://arxiv.org/abs/2309.06180). Knows no model.

A block holds keys and values of `POSITIONS` consecutive positions of every layer. Python's references to a `Block` say
how long it lives: with the last of them it is free again, whatever broke off in between.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable

import numpy as np
import torch

from fiddler.errors import ResourceError
from fiddler.models.config import Config

__all__ = ["POSITIONS", "Block", "BlockPool", "block_bytes", "blocks_for"]

POSITIONS = 32  # in a block
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE: no swap is set aside; named since Python 3.13
_NUMPY = {torch.float16: np.uint16, torch.float32: np.float32}


class Block:
    """A block of a pool; free again when nobody refers to it. Its holders count themselves in `holders`.

    Only a block with a single holder may be written.
    """

    __slots__ = ("_free", "holders", "number")

    def __init__(self, number: int, free: list[int]) -> None:
        self.number, self.holders, self._free = number, 0, free

    def __del__(self) -> None:
        self._free.append(self.number)


class BlockPool:
    """`capacity` blocks at most. On the CPU, memory is taken from the system as blocks are first written.

    `memory`: float16 or float32 [capacity, L, M, G, POSITIONS, head_dim], M: keys and values, or, of latent attention,
    one vector that is both. `array`: the same memory as our kernels take it, float16 as its bits; None on other
    devices.
    """

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device, capacity: int) -> None:
        """Raises ResourceError where the system does not give the addresses of a single block."""
        shape = _shape(config)
        self.array: np.ndarray | None = None
        if device.type == "cpu":
            nbytes = block_bytes(config, dtype)
            region, capacity = _address_space(nbytes, capacity)
            array = np.frombuffer(region, _NUMPY[dtype], capacity * nbytes // dtype.itemsize)
            self.array = array.reshape(capacity, *shape)
            self.memory = torch.from_numpy(self.array).view(dtype)
        else:
            self.memory = torch.empty(capacity, *shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.reclaim: Callable[[], bool] = lambda: False
        """Frees a block that nobody computes with, and returns whether there was one; called where none is free."""
        self._free: list[int] = []
        self._fresh = 0  # blocks from this number on were never taken

    @property
    def available(self) -> int:
        """Blocks that can be taken without reclaiming any."""
        return len(self._free) + self.capacity - self._fresh

    @property
    def used(self) -> int:
        """Blocks that somebody refers to."""
        return self._fresh - len(self._free)

    def take(self) -> Block:
        """A free block, with whatever it held before. Raises ResourceError where there is none."""
        while not self.available and self.reclaim():
            continue
        if self._free:
            return Block(self._free.pop(), self._free)
        if self._fresh == self.capacity:
            raise ResourceError(
                f"the {self.capacity} blocks of the KV cache are in use; give shorter prompts, or fewer at once"
            )
        self._fresh += 1
        return Block(self._fresh - 1, self._free)

    def copy(self, source: Block, target: Block, positions: int) -> None:
        """Copy a block's first `positions` of all layers to another block."""
        self.memory[target.number, ..., :positions, :] = self.memory[source.number, ..., :positions, :]


def blocks_for(positions: int) -> int:
    """Blocks that hold so many positions of one sequence."""
    return -(-positions // POSITIONS)


def block_bytes(config: Config, dtype: torch.dtype) -> int:
    """Size of a block [bytes]."""
    return int(np.prod(_shape(config))) * dtype.itemsize


def _shape(config: Config) -> tuple[int, ...]:
    memories = 2 if config.latent is None else 1
    return config.block_count, memories, config.head_count_kv, POSITIONS, config.head_dim


def _address_space(nbytes: int, capacity: int) -> tuple[mmap.mmap, int]:
    """Memory for up to `capacity` blocks of `nbytes`, not yet backed by any; fewer where addresses are limited."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    while capacity > 0:
        try:
            return mmap.mmap(-1, capacity * nbytes, flags=flags), capacity
        except (OSError, OverflowError, MemoryError):
            capacity //= 2
    raise ResourceError(f"out of memory: no room for {nbytes} bytes of keys and values; close other programs")
