"""A sequence's keys and values in blocks of a pool, which it shares with others until one of them writes.

Knows blocks and positions; not how attention is computed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from fiddler.models.attention import Rows
from fiddler.runtime.block_pool import POSITIONS, Block, BlockPool, Places, blocks_for
from fiddler.runtime.kv_cache import KVCache

__all__ = ["PagedKVCache"]


class PagedKVCache(KVCache):
    """A `KVCache` in blocks of `pool`.

    With a window, single positions that are appended give back the blocks that no later one sees; those of a prompt
    stay until then, so that other sequences may begin with it.
    """

    def __init__(
        self, pool: BlockPool, context: int, window: int | None, blocks: Iterable[Block] = (), length: int = 0
    ) -> None:
        """`blocks`: hold `length` positions that are computed; shared with whoever holds them."""
        self.pool, self.context, self.device = pool, context, pool.memory.device
        self.length = length
        self._window = window
        self._blocks: list[Block | None] = []  # None: given back
        self._table: np.ndarray | None = None
        self._moves = pool.moves
        self._places: tuple[int, int, list[Places]] | None = None  # where the positions of a step are written
        for block in blocks:
            self._append(block)

    def __del__(self) -> None:
        self._drop(0)

    @property
    def blocks(self) -> list[Block | None]:
        """The blocks in the order of positions, reserved ones too; None where one was given back."""
        return self._blocks

    @property
    def table(self) -> np.ndarray:
        """Their numbers, int64; 0 where one was given back."""
        if self._table is None or self._moves != self.pool.moves:
            self._moves, self._places = self.pool.moves, None
            self._table = np.array([0 if block is None else block.number for block in self._blocks], np.int64)
        return self._table

    def fork(self) -> PagedKVCache:
        """A sequence with the same positions, in the same blocks: each copies a block before it writes to it."""
        used = self._blocks[: blocks_for(self.length)]
        forked = PagedKVCache(self.pool, self.context, self._window)
        for block in used:
            forked._append(block)
        forked.length = self.length
        return forked

    def reserve(self, length: int) -> None:
        """Implements `KVCache.reserve`. Afterwards no other sequence has the blocks behind the end."""
        assert length <= self.context, f"{length} positions in a context of {self.context}"
        if length > self.length:
            self._own(self.length // POSITIONS)
        while len(self._blocks) < blocks_for(length):
            self._append(self.pool.take())

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Rows, Rows]:
        """Implements `KVCache.write`."""
        end = self.length + len(keys)
        table = self.table
        if self._places is None or self._places[:2] != (self.length, end):
            positions = np.arange(self.length, end)
            numbers, rows = table[positions // POSITIONS], positions % POSITIONS
            self._places = self.length, end, self.pool.places(numbers, rows)
        self.pool.store(layer, self._places[2], (keys, values))
        memories = self.pool.memory.shape[2]
        read_as = self.pool.layout.read_as
        stored = [_BlockRows(self.pool, layer, memory, table, end, read_as) for memory in range(memories)]
        return stored[0], stored[-1]

    def stored(self, layer: int) -> list[Tensor]:
        """Implements `KVCache.stored`. Copies; a sequence with a window has only the positions that it still sees."""
        pool, table = self.pool, self.table
        memories = range(pool.memory.shape[2])
        return [_BlockRows(pool, layer, memory, table, self.length, pool.layout.exact)[:] for memory in memories]

    def truncate(self, length: int) -> None:
        """Implements `KVCache.truncate`; gives back the blocks behind it."""
        assert 0 <= length <= self.length
        assert None not in self._blocks[: blocks_for(length)] or length == self.length, "positions were given back"
        self.length = length
        self._drop(blocks_for(length))

    def advance(self, count: int) -> None:
        """Implements `KVCache.advance`."""
        super().advance(count)
        if self._window is not None and count == 1:
            for index in range(max(0, self.length + 1 - self._window) // POSITIONS):
                if self._blocks[index] is not None:
                    self._replace(index, None)

    def _own(self, index: int) -> None:
        """Copy a block that others have, too, so that this sequence may write to it."""
        block = self._blocks[index] if index < len(self._blocks) else None
        if block is not None and block.holders > 1:
            copy = self.pool.take()
            self.pool.copy(block, copy, self.length - index * POSITIONS)
            self._replace(index, copy)

    def _append(self, block: Block | None) -> None:
        self._table = self._places = None
        if block is not None:
            block.holders += 1
        self._blocks.append(block)

    def _replace(self, index: int, block: Block | None) -> None:
        self._table = self._places = None
        old = self._blocks[index]
        if block is not None:
            block.holders += 1
        self._blocks[index] = block
        if old is not None:
            old.holders -= 1

    def _drop(self, count: int) -> None:
        """Give back all blocks but the first `count`."""
        self._table = self._places = None
        while len(self._blocks) > count:
            block = self._blocks.pop()
            if block is not None:
                block.holders -= 1


class _BlockRows:
    """Positions in blocks, as `Rows`. A slice copies them together."""

    def __init__(
        self, pool: BlockPool, layer: int, memory: int, numbers: np.ndarray, length: int, dtype: torch.dtype
    ) -> None:
        """memory: 0 for keys, 1 for values. numbers: int64, of the sequence's blocks. dtype: of slices."""
        self._pool, self._layer, self._memory = pool, layer, memory
        self._numbers, self._length = numbers, length
        self.dtype = dtype
        self.shape = length, pool.memory.shape[3], pool.layout.head_dim

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, positions: slice) -> Tensor:
        begin, end, step = positions.indices(self._length)
        assert step == 1
        first = begin // POSITIONS
        blocks = self._pool.blocks(self._layer, self._memory, self._numbers[first : blocks_for(end)])
        rows = blocks.flatten(1, 2)  # [G, n, head_dim]
        return rows[:, begin - first * POSITIONS : end - first * POSITIONS].transpose(0, 1).to(self.dtype)
