"""Tokens appended to one or several sequences in one pass through the model. Knows no model.

On the CPU, one call of our kernel computes the attention of all sequences that get one new position. Torch computes
the attention of sequences that get more positions, and of all sequences on other devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.models.attention import attend
from fiddler.models.config import Config
from fiddler.models.rotary import rotary_cos_sin, rotary_frequencies, rotate
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.paged_kv_cache import PagedKVCache

__all__ = ["Step"]


class Step:
    """A step's rows and the sequences that they belong to: the model's `Cache`."""

    def __init__(self, parts: Sequence[tuple[KVCache, int]], config: Config) -> None:
        """`parts`: each sequence with the number of its tokens, in the order of the step's rows."""
        assert len({id(sequence) for sequence, _ in parts}) == len(parts), "a sequence stands twice in a step"
        for sequence, count in parts:
            sequence.reserve(sequence.length + count)
        self._parts = parts
        self._config = config
        ends = list(accumulate(count for _, count in parts))
        begins = [end - count for end, (_, count) in zip(ends, parts, strict=True)]
        self._by_kernel: list[PagedKVCache] = []
        self._kernel_rows: list[int] = []
        self._by_torch: list[tuple[KVCache, slice]] = []
        for (sequence, count), begin, end in zip(parts, begins, ends, strict=True):
            # of latent attention the kernel does not write the one memory that there is
            paged = isinstance(sequence, PagedKVCache) and sequence.pool.array is not None and config.latent is None
            if count == 1 and paged:
                assert isinstance(sequence, PagedKVCache)
                self._by_kernel.append(sequence)
                self._kernel_rows.append(begin)
            else:
                self._by_torch.append((sequence, slice(begin, end)))

    @property
    def seen_by_torch(self) -> int:
        """Pairs of a query and a key position in torch's part of the attention, masked ones included."""
        return sum(
            (sequence.length + rows.stop - rows.start) * (rows.stop - rows.start) for sequence, rows in self._by_torch
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """Implements `Cache.attend`: rotate, store, attend; each row attends to its own sequence."""
        if not self._by_torch:
            return self._attend_by_kernel(layer, q, k, v, sinks)
        out = torch.empty_like(q)
        if self._by_kernel:
            alone = [tensor[self._kernel_rows] for tensor in (q, k, v)]
            out[self._kernel_rows] = self._attend_by_kernel(layer, alone[0], alone[1], alone[2], sinks)
        for sequence, rows in self._by_torch:
            cos_sin = self._cos_sin[rows]
            keys, values = sequence.write(layer, rotate(k[rows], cos_sin), v[rows])
            out[rows] = attend(rotate(q[rows], cos_sin), keys, values, self._config.window(layer), sinks)
        return out

    def _attend_by_kernel(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        """Attention of the sequences that get one position each."""
        pool = self._by_kernel[0].pool
        assert pool.array is not None
        assert all(sequence.pool is pool for sequence in self._by_kernel), "sequences of different pools"
        tables = [sequence.table for sequence in self._by_kernel]
        lengths = [sequence.length for sequence in self._by_kernel]
        q_array, k_array, v_array = (tensor.contiguous().numpy() for tensor in (q, k, v))
        arrays = q_array, k_array, v_array, pool.array
        of_heads = None if sinks is None else sinks.numpy()
        window, frequencies = self._config.window(layer), self._frequencies
        output = kernels.attend_each(*arrays, layer, tables, lengths, frequencies, window, of_heads)
        return torch.from_numpy(output)

    @cached_property
    def _frequencies(self) -> np.ndarray:
        return rotary_frequencies(self._config, torch.device("cpu")).numpy()

    @cached_property
    def _cos_sin(self) -> Tensor:
        """Cosines and sines that rotate the step's rows to their positions."""
        positions = [torch.arange(sequence.length, sequence.length + count) for sequence, count in self._parts]
        return rotary_cos_sin(self._config, torch.cat(positions).to(self._parts[0][0].device))

    def commit(self) -> None:
        """Lengthen the sequences by the step's tokens, once it went through every layer."""
        for sequence, count in self._parts:
            sequence.advance(count)
