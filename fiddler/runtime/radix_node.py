"""A node of the prefix cache's radix tree: a block of positions and its tokens, packed. Knows no pool and no limit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from struct import pack

from fiddler.runtime.block_pool import POSITIONS, Block

__all__ = ["NODE_BYTES", "RadixNode", "UseOrder", "common_tokens", "packed"]

NODE_BYTES = 272
"""Memory of a node and its tokens, beside its block [bytes]: what Python's allocator takes for 88 and 161."""

_ITEM = 4  # bytes of a token: int32
_FULL = _ITEM * POSITIONS  # bytes of a full block's tokens
_AT_FIRST = 4 * POSITIONS  # tokens that are packed at once: few where nothing of a sequence is known
_AFTERWARDS = 4  # times as many as the last time
_TOKENS = attrgetter("tokens")


class RadixNode:
    """A block whose first positions hold these tokens, after those of its parents. Only a full one has children.

    `tokens`: int32, as bytes. `block`: in the pool; None where it is `stored`. `older`, `newer`: see `UseOrder`.
    Most nodes have one child or none: a list is there for several.
    """

    __slots__ = ("_below", "block", "newer", "older", "parent", "stored", "tokens")

    def __init__(self, tokens: bytes, block: Block | None, parent: RadixNode | None) -> None:
        self.tokens, self.block, self.parent = tokens, block, parent
        self.stored: Block | None = None
        self._below: RadixNode | list[RadixNode] | None = None
        self.older: RadixNode | None = None
        self.newer: RadixNode | None = None

    @property
    def length(self) -> int:
        """Number of its tokens."""
        return len(self.tokens) // _ITEM

    @property
    def children(self) -> Sequence[RadixNode]:
        """All of them, sorted by their bytes: those that have most tokens in common with others are beside them."""
        below = self._below
        return below if isinstance(below, list) else () if below is None else (below,)

    def place(self, tokens: bytes) -> int:
        """Where among the children one with these tokens is, or belongs."""
        return bisect_left(self.children, tokens, key=_TOKENS)

    def add(self, at: int, child: RadixNode) -> None:
        """Have one more child, at its `place`."""
        if isinstance(self._below, list):
            self._below.insert(at, child)
        elif self._below is None:
            self._below = child
        else:
            self._below = [child, self._below] if at == 0 else [self._below, child]

    def drop(self, child: RadixNode) -> None:
        """Have one child less."""
        if isinstance(self._below, list):
            del self._below[self.place(child.tokens)]
            if len(self._below) == 1:
                self._below = self._below[0]
        else:
            self._below = None

    def drop_all(self) -> Sequence[RadixNode]:
        """Have no children any more; returns them."""
        children, self._below = self.children, None
        return children

    def walk(self, texts: Iterable[bytes]) -> tuple[list[RadixNode], bytes]:
        """The nodes below that have a sequence's first, full blocks; tokens of the next block, b"" where all are there.

        texts: the tokens of its blocks, see `packed`.
        """
        node, path = self, list[RadixNode]()
        for tokens in texts:
            if len(tokens) < _FULL:
                return path, tokens
            child = node._below
            if isinstance(child, list):
                at = bisect_left(child, tokens, key=_TOKENS)
                child = child[at] if at < len(child) else None
            if child is None or child.tokens != tokens:
                return path, tokens
            path.append(child)
            node = child
        return path, b""

    def closest(self, tokens: bytes) -> tuple[RadixNode | None, int]:
        """The child that has the longest prefix in common with a block's tokens, and its length."""
        at = self.place(tokens)
        beside = [(common_tokens(child.tokens, tokens), child) for child in self.children[max(at - 1, 0) : at + 1]]
        count, best = max(beside, key=lambda each: each[0], default=(0, None))
        return (best, count) if count else (None, 0)


class UseOrder:
    """Nodes in the order of their last use: a ring through them and `_end`. A node may be in one at a time."""

    def __init__(self) -> None:
        self._end = RadixNode(b"", None, None)
        self._end.older = self._end.newer = self._end
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[RadixNode]:
        """From the least recently used one on; not while it changes."""
        node = self._end.newer
        while node is not self._end:
            assert node is not None
            yield node
            node = node.newer

    @property
    def oldest(self) -> RadixNode:
        """The least recently used node, of one or more."""
        assert self._count
        assert self._end.newer is not None
        return self._end.newer

    def unused(self, enough: int) -> int:
        """Number of nodes whose block nobody else has, counted from the oldest one on up to `enough`."""
        count, node = 0, self._end.newer
        while count < enough and node is not None and node.block is not None:
            count += node.block.holders == 1
            node = node.newer
        return count

    def use(self, nodes: Iterable[RadixNode]) -> None:
        """Note that these nodes, of which some may not be here yet, are used now, one after the other."""
        end = self._end
        for node in nodes:  # no call within: where Ctrl-C ends the loop, the ring is whole
            older, newer = node.older, node.newer
            if older is None or newer is None:
                self._count += 1
            else:
                older.newer, newer.older = newer, older
            last = end.older
            assert last is not None
            last.newer = end.older = node
            node.older, node.newer = last, end

    def remove(self, node: RadixNode) -> None:
        """Take a node out, if it is here."""
        older, newer = node.older, node.newer
        if older is not None and newer is not None:
            older.newer, newer.older = newer, older
            node.older = node.newer = None
            self._count -= 1


def packed(ids: Sequence[int]) -> Iterator[bytes]:
    """The tokens of each block of a sequence, int32 as bytes; the last one may have fewer than `POSITIONS`."""
    end, count = 0, _AT_FIRST
    while some := ids[end : end + count]:
        data = pack(f"{len(some)}i", *some)
        end, count = end + count, _AFTERWARDS * count
        for begin in range(0, len(data), _FULL):
            yield data[begin : begin + _FULL]


def common_tokens(one: bytes, other: bytes) -> int:
    """Length of the common prefix of packed tokens."""
    shorter = min(len(one), len(other))
    differing = int.from_bytes(one[:shorter], "big") ^ int.from_bytes(other[:shorter], "big")
    return (8 * shorter - differing.bit_length()) // (8 * _ITEM)
