"""The KV cache of captured decode steps. Knows one token of one sequence; not what the graphs hold beside attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fiddler.gpu import attention_kernels
from fiddler.models.config import Config
from fiddler.runtime.block_pool import BlockPool

__all__ = ["DecodeCache"]


class DecodeCache:
    """The model's `Cache` for one token of one sequence, whose position and block table kernels read on the device.

    So one captured graph serves every position of every sequence.
    """

    def __init__(self, pool: BlockPool, place: Tensor, cos_sin: Tensor, config: Config) -> None:
        """place: int64, the position, then the sequence's block table, as `offsets` of the pool."""
        self._first, self._cos_sin, self._config = pool.memory[0], cos_sin, config
        self._dtype = pool.layout.read_as
        self._row = torch.zeros(1, dtype=torch.int64, device=place.device)
        self._tables = attention_kernels.Tables(place[:1], place[1:], self._row)
        bounds, size = attention_kernels.latent_tiles([(0, 1)], config.head_count, self._dtype)
        self._tiles = attention_kernels.LatentTiles(bounds.to(place.device), size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`."""
        latent, tables = self._config.latent is not None, self._tables
        keys, values = self._first[layer, 0], None if latent else self._first[layer, 1]
        q = attention_kernels.rotate_and_store(q, k, v, self._cos_sin, tables, keys, values)
        out = torch.empty_like(q)
        if values is None:
            assert sinks is None, "attention to latents has no sinks"
            rotated, dtype = self._config.rotated, self._dtype
            attention_kernels.attend_latent(q, keys, tables, self._tiles, rotated, out, dtype)
        else:
            window = self._config.window(layer)
            attention_kernels.attend_rows(q, keys, values, tables, self._row, window, out, sinks=sinks)
        return out
