"""Whether the KV caches of requests fit in memory. Knows lengths of sequences and bytes; no blocks and no devices.

Paged caches take memory as they grow, and a prefix that several have is there once. So a request joins where what it
needs soon is free; where all have grown beyond the memory, one gives way, and its blocks are found again later.
"""

from __future__ import annotations

from fiddler.generation.sequence_group import SequenceGroup
from fiddler.runtime.runner import Runner

__all__ = ["KVBudget"]

_AHEAD = 256  # positions by which each sequence must have room to grow when another one joins


class KVBudget:
    """The KV caches of all running groups, of at most `limit` bytes; None for no limit."""

    def __init__(self, runner: Runner, limit: int | None) -> None:
        self._runner, self._limit = runner, limit

    def fits(self, group: SequenceGroup, growth: int) -> bool:
        """Whether this group fits beside running ones, whose `growth` this is in all [bytes]."""
        if self._limit is None:
            return True
        if not self._runner.shares:
            return self._limit >= growth + self.growth(group)
        known = self._runner.matched(group.sequences[0].tokens) if group.reuse else 0
        shared = max(0, self._runner.kv_bytes(known) - self._runner.kv_bytes(1))  # it writes to the last block
        free = self._limit - growth - self._growth(group, shared)
        return free >= 0 and (self._runner.kv_used(free) or 0) <= free

    def growth(self, group: SequenceGroup) -> int:
        """Bytes that a running group needs soon, beside those that it has; all it may need, where it has its own."""
        if self._limit is None:
            return 0
        if not self._runner.shares:
            return group.max_sequences * self._runner.kv_bytes(group.max_positions)
        return self._growth(group, self._runner.kv_bytes(_cached(group)))

    def exceeded(self) -> bool:
        """Whether the running groups have grown beyond the limit."""
        used = None if self._limit is None else self._runner.kv_used(self._limit)
        return used is not None and self._limit is not None and used > self._limit

    def _growth(self, group: SequenceGroup, there: int) -> int:
        """Bytes that a group needs soon, beside those that are `there`. Beams have the prompt once."""
        kv_bytes, longest = self._runner.kv_bytes, max(len(sequence.tokens) for sequence in group.sequences)
        end = kv_bytes(min(longest + _AHEAD, group.max_positions))
        beside = end - kv_bytes(longest) + kv_bytes(1)
        return max(0, end - there) + (group.max_sequences - 1) * max(0, beside)


def _cached(group: SequenceGroup) -> int:
    return min(0 if sequence.cache is None else sequence.cache.length for sequence in group.sequences)
