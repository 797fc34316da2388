"""A step of several rows whose attention our Triton kernels compute over the blocks of a pool. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from fiddler.models.config import Config
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.step import Step

__all__ = ["GpuStep"]


class GpuStep(Step):
    """A `Step` that launches the same few kernels a layer for any number of sequences."""

    def __init__(
        self, parts: Sequence[tuple[KVCache, int]], config: Config, cos_sin: Tensor, attention: ModuleType
    ) -> None:
        """cos_sin: of every position, see `attention_kernels.rotate_and_store`. attention: that module."""
        super().__init__(parts, config)
        self._cos_sin_table, self._attention = cos_sin, attention
        sequences = [sequence for sequence, _ in parts if isinstance(sequence, PagedKVCache)]
        assert len(sequences) == len(parts), "the kernels attend to blocks"
        pool, counts = sequences[0].pool, [count for _, count in parts]
        assert all(sequence.pool is pool for sequence in sequences), "sequences of different pools"
        self._first = pool.memory[0]
        tables = [pool.offsets[sequence.table] for sequence in sequences]
        begins = [0, *accumulate(counts)]
        firsts = [0, *accumulate(len(table) for table in tables)][:-1]
        single = [begin for begin, count in zip(begins, counts, strict=False) if count == 1]
        many = [(begin, count) for begin, count in zip(begins, counts, strict=False) if count > 1]
        self._dtype = dtype = pool.layout.read_as
        heads, nothing = config.head_count, (torch.empty(0, 2, dtype=torch.int64), 0)
        if config.latent is None:
            of_single, of_many = nothing, attention.tiles_of(many, dtype) if many else nothing
        else:
            alone = [(begin, 1) for begin in single]
            of_single, of_many = (
                attention.latent_tiles(rows, heads, dtype) if rows else nothing for rows in (alone, many)
            )
        positions, blocks, row_firsts, self._single, single_tiles, many_tiles = _on_device(
            [
                np.concatenate(
                    [np.arange(s.length, s.length + count) for s, count in zip(sequences, counts, strict=True)]
                ),
                np.concatenate(tables),
                np.repeat(firsts, counts),
                np.array(single, np.int64),
                of_single[0].numpy().reshape(-1),
                of_many[0].numpy().reshape(-1),
            ],
            pool.device,
        )
        self._tables = attention.Tables(positions, blocks, row_firsts)
        # the bounds of each tile's rows, and the most rows of one
        self._tiles_of_single = single_tiles.view(-1, 2), of_single[1]
        self._tiles = many_tiles.view(-1, 2), of_many[1]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`."""
        if self._config.latent is not None:
            assert sinks is None, "attention to latents has no sinks"
            return self._attend_latent(layer, q, k)
        keys, values = self._first[layer, 0], self._first[layer, 1]
        window, tables = self._config.window(layer), self._tables
        q = self._attention.rotate_and_store(q, k, v, self._cos_sin_table, tables, keys, values)
        out = torch.empty_like(q)
        if len(self._single):
            self._attention.attend_rows(q, keys, values, tables, self._single, window, out, sinks=sinks)
        if len(self._tiles[0]):
            tiles = self._tiles
            self._attention.attend_tiles(q, keys, values, tables, tiles, window, out, self._dtype, sinks=sinks)
        return out

    def _attend_latent(self, layer: int, q: Tensor, k: Tensor) -> Tensor:
        """`attend` of latent attention."""
        keys, tables, attention = self._first[layer, 0], self._tables, self._attention
        q = attention.rotate_and_store(q, k, k, self._cos_sin_table, tables, keys, None)
        out = torch.empty_like(q)
        for bounds, size in (self._tiles_of_single, self._tiles):
            if len(bounds):
                tiles = attention.LatentTiles(bounds, size)
                attention.attend_latent(q, keys, tables, tiles, self._config.rotated, out, self._dtype)
        return out


def _on_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """int64 arrays, in one copy. Each begins at a multiple of 16 bytes, for which the kernels are compiled."""
    begins = [0, *accumulate(-(-len(array) // 2) * 2 for array in arrays)]
    together = np.zeros(max(2, begins[-1]), np.int64)
    for begin, array in zip(begins, arrays, strict=False):
        together[begin : begin + len(array)] = array
    numbers = torch.from_numpy(together).to(device)
    return [numbers[begin : begin + len(array)] for begin, array in zip(begins, arrays, strict=False)]
