"""A runner whose sequences' keys and values lie in blocks of one pool, and whose past sequences are remembered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from fiddler.host_memory import available_memory, memory_for_sequences
from fiddler.models.transformer import Transformer
from fiddler.runtime.block_pool import BlockPool, block_bytes, blocks_for
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.prefix_cache import PrefixCache
from fiddler.runtime.runner import Runner

__all__ = ["PagedRunner"]

_MOST_REMEMBERED = 1 << 33  # bytes of past sequences
_REMEMBERED = 0.125  # of the available memory: the fraction that past sequences may take


class PagedRunner(Runner):
    """A `Runner` with paged KV caches."""

    shares = True

    def __init__(
        self,
        model: Transformer,
        context: int,
        cache_dtype: torch.dtype,
        threads: int,
        chunk: int = 512,
        pool: BlockPool | None = None,
    ) -> None:
        """pool: where all its blocks may hold past sequences that no other sequence needs; None: the host's memory."""
        super().__init__(model, context, cache_dtype, threads, chunk)
        if pool is not None:
            self.pool, self.prefix_cache = pool, PrefixCache(pool, None)
            return
        nbytes, least, available = self.kv_bytes(1), blocks_for(context), available_memory()
        self.pool = BlockPool(model.config, cache_dtype, model.token_embd.device, max(2 * least, available // nbytes))
        remembered = min(_MOST_REMEMBERED, int(_REMEMBERED * available)) // nbytes
        self.prefix_cache = PrefixCache(self.pool, max(least, remembered))

    def sequence(self, positions: int = 0) -> PagedKVCache:
        """Implements `Runner.sequence`. Takes no block before the first step."""
        return PagedKVCache(self.pool, self.context, self.model.config.cache_window)

    def sequences(self, count: int, positions: int) -> list[KVCache]:
        """Implements `Runner.sequences`."""
        return [self.sequence() for _ in range(max(1, min(count, self.pool.max_bytes // self.kv_bytes(positions))))]

    def kv_bytes(self, positions: int) -> int:
        """Implements `Runner.kv_bytes`."""
        return blocks_for(positions) * self._block_bytes

    @cached_property
    def _block_bytes(self) -> int:
        return block_bytes(self.model.config, self.cache_dtype)

    def room(self, weights: int) -> int | None:
        """Implements `Runner.room`."""
        return memory_for_sequences(available_memory(), weights)

    def kv_used(self, enough: int = 0) -> int:
        """Implements `Runner.kv_used`."""
        nbytes = self.kv_bytes(1)
        held = self.pool.used * nbytes
        over = -(-(held - enough) // nbytes)  # blocks
        return held if over <= 0 else held - self.prefix_cache.unused(over) * nbytes

    def kv_taken(self) -> int:
        """Implements `Runner.kv_taken`."""
        return self.pool.taken_bytes

    def past_blocks(self) -> int:
        """Implements `Runner.past_blocks`."""
        return self.prefix_cache.blocks + self.prefix_cache.stored

    def past_bytes(self) -> int:
        """Implements `Runner.past_bytes`."""
        return self.prefix_cache.nbytes

    def matched(self, ids: Sequence[int]) -> int:
        """Implements `Runner.matched`."""
        return self.prefix_cache.matched(ids)

    def resume(self, ids: Sequence[int], positions: int = 0) -> PagedKVCache:
        """Implements `Runner.resume`."""
        known = self.prefix_cache.take(ids, self.context, self.model.config.cache_window)
        return self.sequence() if known is None else known

    def keep(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Implements `Runner.keep`."""
        assert isinstance(sequence, PagedKVCache)
        self.prefix_cache.put(sequence, tokens)

    def share(self, sequence: KVCache, tokens: Sequence[int]) -> None:
        """Implements `Runner.share`."""
        self.keep(sequence, tokens)

    def forget(self) -> None:
        """Implements `Runner.forget`."""
        self.prefix_cache.clear()

    def copy(self, source: KVCache, target: KVCache | None = None, shared: int = 0) -> PagedKVCache:
        """Implements `Runner.copy`: both have the same blocks until one of them writes."""
        assert isinstance(source, PagedKVCache)
        return source.fork()
