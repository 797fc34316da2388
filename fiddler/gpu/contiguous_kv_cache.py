"""A sequence's keys and values in one memory a layer, whose address captured graphs know. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from fiddler.models.attention import Rows
from fiddler.models.config import Config
from fiddler.runtime.kv_cache import KVCache

__all__ = ["ContiguousKVCache", "contiguous_kv_bytes"]

_FIRST_CAPACITY = 256  # positions; doubled when full


class ContiguousKVCache(KVCache):
    """A `KVCache` whose memory grows with its length."""

    def __init__(
        self,
        config: Config,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        """`storage`: memory to reuse, of a sequence that is no longer used."""
        self.context = context
        self.length = 0
        self._config = config
        self._heads, self._head_dim = config.head_count_kv, config.head_dim
        self.device, self._dtype = device, dtype
        empty = [self._empty(0) for _ in range(config.block_count)]
        self._keys, self._values = (empty, list(empty)) if storage is None else storage
        if config.latent is not None:  # one memory for both
            self._values = self._keys
        self._memories = (self._keys,) if config.latent is not None else (self._keys, self._values)
        self._capacity = min(tensor.shape[1] for tensor in (*self._keys, *self._values))  # positions
        self._home: ContiguousKVCache | None = None  # whose memory this is a part of: it is in use as long as this

    @property
    def storage(self) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [G, capacity, head_dim]; in latent attention they are the same tensors."""
        return self._keys, self._values

    def reserve(self, length: int) -> None:
        """Implements `KVCache.reserve`."""
        assert length <= self.context, f"{length} positions in a context of {self.context}"
        if length <= self._capacity:
            return
        present = min(tensor.shape[1] for tensor in (*self._keys, *self._values)) if self.length else 0
        capacity = _capacity_for(length, self.context, present)  # an empty one gets no more than a new one
        self._capacity = 0  # if an allocation fails, layers differ in capacity and must grow again
        for layer in range(len(self._keys)):
            grown = [self._empty(capacity) for _ in self._memories]
            for memory, new in zip(self._memories, grown, strict=True):
                new[:, : self.length] = memory[layer][:, : self.length]
            for memory, new in zip(self._memories, grown, strict=True):
                memory[layer] = new
        self._capacity = capacity

    def divided(self, count: int, length: int) -> list[ContiguousKVCache]:
        """`count` empty sequences of at most `length` positions each, in this one's memory: do not use it meanwhile."""
        self.reserve(count * length)
        size = self._heads * length * self._head_dim

        def parts(layers: list[Tensor], index: int) -> list[Tensor]:
            flat = (tensor.view(-1)[index * size : (index + 1) * size] for tensor in layers)
            return [tensor.view(self._heads, length, self._head_dim) for tensor in flat]

        sequences = [
            ContiguousKVCache(
                self._config, length, self._dtype, self.device, (parts(self._keys, i), parts(self._values, i))
            )
            for i in range(count)
        ]
        for sequence in sequences:
            sequence._home = self
        return sequences

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Rows, Rows]:
        """Implements `KVCache.write`."""
        end = self.length + keys.shape[0]
        stored = [memory[layer].transpose(0, 1) for memory in self._memories]  # [capacity, G, head_dim]
        for target, new in zip(stored, (keys, values), strict=False):
            target[self.length : end] = new
        return stored[0][:end], stored[-1][:end]

    def stored(self, layer: int) -> list[Tensor]:
        """Implements `KVCache.stored`."""
        return [memory[layer].transpose(0, 1)[: self.length] for memory in self._memories]

    def become(self, other: ContiguousKVCache, shared: int = 0) -> None:
        """Copy `other`, from its position `shared` on: the positions before are the same in both."""
        assert shared <= min(self.length, other.length)
        self.length = shared  # positions that `reserve` copies, and that stay valid where it fails
        self.reserve(min(other.length + _FIRST_CAPACITY, self.context))  # else it would grow at the next step
        for targets, sources in zip(self._memories, other._memories, strict=True):
            for target, source in zip(targets, sources, strict=True):
                target[:, shared : other.length] = source[:, shared : other.length]
        self.length = other.length

    def truncate(self, length: int) -> None:
        """Implements `KVCache.truncate`."""
        assert 0 <= length <= self.length
        self.length = length

    def _empty(self, capacity: int) -> Tensor:
        """[G, capacity, head_dim]: the positions of one head lie together."""
        return torch.empty(self._heads, capacity, self._head_dim, dtype=self._dtype, device=self.device)


def contiguous_kv_bytes(config: Config, context: int, dtype: torch.dtype, length: int) -> int:
    """A new sequence that reserves `length` positions at once [bytes]."""
    row = config.head_count_kv * config.head_dim * dtype.itemsize
    memories = 2 if config.latent is None else 1
    return memories * config.block_count * row * _capacity_for(length, context)


def _capacity_for(length: int, context: int, present: int = 0) -> int:
    """Positions to allocate where `length` are needed and `present` are allocated."""
    return min(context, max(length, 2 * present, _FIRST_CAPACITY))
