"""One budget for keys and values and for resident experts: the pool grows at their cost, and gives back when idle.

Knows bytes and blocks; not how experts are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import proxy

from fiddler.gpu.growing_pool import GrowingPool
from fiddler.offload.evictions import Evictions
from fiddler.runtime.prefix_cache import PrefixCache

__all__ = ["ElasticBudget"]

_ASKED = 16  # steps between two looks at how much of the pool is in use
_PATIENCE = 8  # looks at which much is unused before the first expert comes back
_USED = 0.5  # the fraction of a smaller pool that may be in use when an expert comes back
_GIVEN = 0.5  # the fraction of the residents' memory that new sequences may take; those that run may take all


class ElasticBudget:
    """Evicts residents while sequences need blocks; loads them again where blocks were unused for some time."""

    def __init__(self, pool: GrowingPool, room: Callable[[], int], evictions: Evictions, later: int = 0) -> None:
        """room: bytes that may still be allocated. later: those that residents give up for one sequence at least."""
        self._pool: GrowingPool = proxy(pool)  # no cycle: the pool is freed with its last user
        self._room, self._evictions = room, evictions
        self._steps = self._idle = 0
        evictable = evictions.evictable
        self._given = min(evictable, max(later, int(_GIVEN * evictable)))
        pool.room, pool.displaceable, pool.make_room = room, self.displaceable, self.make_room

    def displaceable(self) -> int:
        """Bytes that residents should give up for new sequences."""
        return max(0, self._given - self._evictions.evicted * self._evictions.nbytes)

    def make_room(self, nbytes: int) -> bool:
        """Evict residents until so many bytes are free; returns whether they are."""
        while self._room() < nbytes:
            if not self._evictions.evict():
                return False
        return True

    def before_step(self, prefix_cache: PrefixCache) -> None:
        """Load an evicted expert again, if the pool has not needed its memory for some time."""
        self._steps += 1
        if not self._evictions.evicted or self._steps % _ASKED:
            return
        lacking = self._evictions.nbytes - self._room()
        number = self._pool.below(lacking) if lacking > 0 else self._pool.capacity
        in_use = self._pool.used - prefix_cache.unused()
        if number is None or in_use > _USED * number:
            self._idle = 0
            return
        self._idle += 1
        if self._idle > _PATIENCE and (lacking <= 0 or self._pool.shrink(number)):
            self._evictions.restore()
