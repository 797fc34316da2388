"""Past sequences' keys and values, for every prompt that begins with the same tokens: a radix tree of blocks by tokens.

As RadixAttention (SGLang, https://arxiv.org/abs/2312.07104): a path from the root spells a sequence's first tokens, one
block a node; the least recently used leaves go first: out of the pool, and where there is a store, to that. So a path's
first nodes have their blocks in the pool, the others in the store. A limit of nodes bounds the tree's own memory, which
is the host's. Knows blocks and tokens; no model and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from weakref import WeakMethod

from fiddler.errors import ResourceError
from fiddler.runtime.block_pool import POSITIONS, Block, BlockPool
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.radix_node import NODE_BYTES, RadixNode, UseOrder, packed

__all__ = ["TREE_BYTES", "PrefixCache", "common"]

TREE_BYTES = 64 << 20
"""The most host memory of the tree itself, keys and values aside [bytes].

Enough for 4.7 million positions of a pool on a GPU, 5.8 million on the CPU: keys and values of so many take 100 GB and
more, but for models of less than 20 KiB a position. With these a server would else grow until the pool is full.
"""


class PrefixCache:
    """Blocks of past sequences, at most `max_blocks` of the pool's, None: all; fewer where others need its memory.

    `store`: takes the blocks that others need, where copying them back pays.
    """

    def __init__(self, pool: BlockPool, max_blocks: int | None, max_nodes: int | None = None) -> None:
        """max_nodes: the most blocks in pool and store together; None: for which the tree takes `TREE_BYTES`."""
        self.store: HostStore | None = None
        self.node_bytes = NODE_BYTES + pool.object_bytes
        """Host memory of a block that is known, keys and values aside [bytes]: an estimate."""
        self._pool, self._max_blocks = pool, max_blocks
        self._max_nodes = TREE_BYTES // self.node_bytes if max_nodes is None else max_nodes
        self._root = RadixNode(b"", None, None)
        self._nodes = UseOrder()  # those in the pool, children before parents
        self._stored = UseOrder()  # those in the store, likewise
        own = WeakMethod(self._reclaim)  # no cycle: the pool is freed with its last user
        pool.reclaim = lambda: (reclaim := own()) is not None and reclaim()

    @property
    def blocks(self) -> int:
        """Number of blocks in the tree that are in the pool."""
        return len(self._nodes)

    @property
    def stored(self) -> int:
        """Number of blocks in the tree that are in the store."""
        return len(self._stored)

    @property
    def nbytes(self) -> int:
        """Host memory of the tree itself, keys and values aside [bytes]: an estimate, by its number of nodes."""
        return (self.blocks + self.stored) * self.node_bytes

    def unused(self, enough: int | None = None) -> int:
        """Number of blocks that nobody has beside the tree; counting stops at `enough`."""
        return self._nodes.unused(self.blocks if enough is None else enough)

    def matched(self, ids: Sequence[int]) -> int:
        """The tokens of the longest common prefix of `ids` and a past sequence, as far as it is in the pool."""
        path, length = self._path(ids)
        return min(length, len(_blocks(path)) * POSITIONS)

    def put(self, sequence: PagedKVCache, tokens: Sequence[int]) -> None:
        """Remember a sequence, which holds the first `sequence.length` of `tokens` and may go on being used."""
        ids = tokens[: sequence.length]
        assert sequence.length == len(ids), "tokens of some positions are unknown"
        texts, blocks = list(packed(ids)), sequence.blocks
        path, _ = self._root.walk(texts)
        del path[len(_blocks(path)) :]  # those in the store come again below
        node = path[-1] if path else self._root
        for index in range(len(path), len(texts)):
            block, positions = blocks[index], len(ids) - index * POSITIONS
            child = self._child(node, texts[index], block)
            if child is None or (child.block is None and not self._adopt(child, block, positions)):
                break
            path.append(child)
            node = child
        self._touch(path)
        self._limit()

    def take(self, ids: Sequence[int], context: int, window: int | None) -> PagedKVCache | None:
        """A sequence that begins with the longest common prefix of `ids` and a past one; None where there is none.

        At least one of `ids` is left to compute, for the logits after it. Several sequences may have the same blocks.
        Blocks of the store are copied back where that pays, as far as the pool has room.
        """
        path, length = self._path(ids[: max(len(ids) - 1, 0)])
        self._touch(path)
        blocks = _blocks(path)
        sequence = PagedKVCache(self._pool, context, window, blocks, min(length, len(blocks) * POSITIONS))
        if sequence.length < length:  # while others make room, it holds its blocks
            count = len(blocks) + self._restore(path[len(blocks) :], length - sequence.length)
            self._touch(path)
            sequence = PagedKVCache(self._pool, context, window, _blocks(path), min(length, count * POSITIONS))
        return sequence if sequence.length else None

    def clear(self) -> None:
        """Forget all sequences; blocks that nobody else has are free."""
        for node in reversed(list(self._root.children)):  # a list's last elements go fastest
            self._remove(node)

    def _path(self, ids: Sequence[int]) -> tuple[list[RadixNode], int]:
        """The nodes of the longest common prefix of `ids` and a past sequence, and its length."""
        path, rest = self._root.walk(packed(ids))
        last, count = (path[-1] if path else self._root).closest(rest)
        length = len(path) * POSITIONS + count
        return (path, length) if last is None else ([*path, last], length)

    def _child(self, node: RadixNode, tokens: bytes, block: Block | None) -> RadixNode | None:
        """The child with these tokens, or with more where they fill no block; made if there is none.

        None where the block was given back.
        """
        at, children = node.place(tokens), node.children
        if at < len(children) and children[at].tokens.startswith(tokens):
            return children[at]
        if block is None:
            return None
        if at and tokens.startswith(children[at - 1].tokens):
            at -= 1
            self._remove(children[at])  # it has no child: it is not full
        child = RadixNode(tokens, block, node)
        block.holders += 1
        node.add(at, child)
        return child

    def _touch(self, path: Sequence[RadixNode]) -> None:
        """Note that these nodes, from the root on, are used now."""
        count = len(_blocks(path))
        self._stored.use(reversed(path[count:]))  # so that parents are younger than their children
        self._nodes.use(reversed(path[:count]))

    def _limit(self) -> None:
        """Forget the least recently used nodes beyond the limits; those in the store first: they were used before."""
        while self._max_blocks is not None and len(self._nodes) > self._max_blocks:
            self._remove(self._nodes.oldest)  # whatever is behind it is in the store
        while len(self._nodes) + len(self._stored) > self._max_nodes:
            self._remove((self._stored or self._nodes).oldest)

    def _remove(self, node: RadixNode) -> None:
        """Forget a node and all behind it."""
        assert node.parent is not None
        node.parent.drop(node)
        behind = [node]
        for each in behind:
            behind += each.drop_all()  # no cycle
            if each.block is None:
                self._stored.remove(each)
            else:
                self._nodes.remove(each)
                each.block.holders -= 1
            each.block = each.stored = None

    def _adopt(self, node: RadixNode, block: Block | None, positions: int) -> bool:
        """Give a stored node a block of the pool with so many of its positions or more; whether these are enough."""
        if block is None or positions < node.length:
            return False
        block.holders += 1
        self._stored.remove(node)
        node.block, node.stored = block, None
        self._nodes.use([node])
        return True

    def _restore(self, nodes: Sequence[RadixNode], positions: int) -> int:
        """Copy the blocks of a path's stored nodes to the pool, as many as it has room for; returns their number.

        positions: that need not be computed then; where computing them takes less time, nothing is copied.
        """
        assert self.store is not None
        if not self.store.pays(len(nodes), positions):
            return 0
        for node in nodes:
            self._stored.remove(node)  # so that they stay while others make room
        blocks: list[Block] = []
        try:
            with suppress(ResourceError):
                while len(blocks) < len(nodes):
                    blocks.append(self._pool.take())
            pairs = [(node.stored, block) for node, block in zip(nodes, blocks, strict=False) if node.stored]
            self.store.load(pairs)
            for node, block in zip(nodes, blocks, strict=False):
                self._adopt(node, block, POSITIONS)
        finally:
            self._touch(nodes)
        return len(blocks)

    def _reclaim(self) -> bool:
        """Free the least recently used block that nobody else has; False where there is none.

        Blocks in use count as used now. Where a sequence with a window gave back blocks, later ones that it has are
        forgotten, since only leaves can go.
        """
        for _ in range(len(self._nodes)):
            if not self._nodes:
                break
            node = self._nodes.oldest
            if _unused(node):
                if not self._save(node):
                    self._remove(node)
                return True
            path = _ancestors(node)
            if any(_unused(each) for each in path):
                self._remove(node)
            else:
                self._touch(path)
        return False

    def _save(self, node: RadixNode) -> bool:
        """Move a node's block to the store, which forgets the least recently used ones, where copying it back pays."""
        if self.store is None or not self.store.pays(1, node.length):
            return False
        assert node.block is not None
        while (stored := self.store.save(node.block)) is None and self._stored:
            self._remove(self._stored.oldest)
        if stored is None:
            return False
        node.block.holders -= 1
        self._nodes.remove(node)
        node.block, node.stored = None, stored
        self._stored.use([node])
        return True


def _blocks(path: Sequence[RadixNode]) -> list[Block]:
    """The blocks of a path's first nodes, those in the pool."""
    return [node.block for node in path if node.block is not None]


def _ancestors(node: RadixNode) -> list[RadixNode]:
    """The path from the root to a node, which is its last."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def _unused(node: RadixNode) -> bool:
    """Whether nobody has a node's block beside the tree."""
    return node.block is not None and node.block.holders == 1


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
