"""Past sequences' keys and values, for every prompt that begins with the same tokens: a radix tree of blocks by tokens.

As RadixAttention (SGLang, https://arxiv.org/abs/2312.07104): a path from the root spells a sequence's first tokens, one
block a node; the least recently used leaves go first. Knows blocks and tokens; no model and no text.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence
from weakref import WeakMethod

from fiddler.runtime.block_pool import POSITIONS, Block, BlockPool
from fiddler.runtime.paged_kv_cache import PagedKVCache

__all__ = ["PrefixCache", "common"]

Tokens = tuple[int, ...]


class _Node:
    """A block whose first positions hold these tokens, after those of its parents. Only a full one has children."""

    __slots__ = ("block", "children", "order", "parent", "tokens")

    def __init__(self, tokens: Tokens, block: Block | None, parent: _Node | None) -> None:
        self.tokens, self.block, self.parent = tokens, block, parent
        self.children: dict[Tokens, _Node] = {}
        self.order: list[Tokens] = []  # the children's tokens, sorted: those with the longest common prefix are beside


class PrefixCache:
    """Blocks of past sequences, at most `max_blocks`, None: all; fewer where others need the pool's memory."""

    def __init__(self, pool: BlockPool, max_blocks: int | None) -> None:
        self._pool, self._max_blocks = pool, max_blocks
        self._root = _Node((), None, None)
        self._nodes: OrderedDict[_Node, None] = OrderedDict()  # the least recently used first, children before parents
        own = WeakMethod(self._reclaim)  # no cycle: the pool is freed with its last user
        pool.reclaim = lambda: (reclaim := own()) is not None and reclaim()

    @property
    def blocks(self) -> int:
        """Number of blocks in the tree."""
        return len(self._nodes)

    @property
    def unused(self) -> int:
        """Number of blocks that nobody has beside the tree."""
        return sum(node.block is not None and node.block.holders == 1 for node in self._nodes)

    def matched(self, ids: Sequence[int]) -> int:
        """The tokens of the longest common prefix of `ids` and a past sequence."""
        path, last, count = self._find(tuple(ids))
        return len(path) * POSITIONS + (count if last is not None else 0)

    def put(self, sequence: PagedKVCache, tokens: Sequence[int]) -> None:
        """Remember a sequence, which holds the first `sequence.length` of `tokens` and may go on being used."""
        ids, node = tuple(tokens[: sequence.length]), self._root
        assert sequence.length == len(ids), "tokens of some positions are unknown"
        path = []
        for begin, block in zip(range(0, len(ids), POSITIONS), sequence.blocks, strict=False):
            child = self._child(node, ids[begin : begin + POSITIONS], block)
            if child is None:
                break
            path.append(child)
            node = child
        self._touch(path)
        while self._max_blocks is not None and len(self._nodes) > self._max_blocks:
            self._evict()

    def take(self, ids: Sequence[int], context: int, window: int | None) -> PagedKVCache | None:
        """A sequence that begins with the longest common prefix of `ids` and a past one; None where there is none.

        At least one of `ids` is left to compute, for the logits after it. Several sequences may have the same blocks.
        """
        path, last, count = self._find(tuple(ids[: max(len(ids) - 1, 0)]))
        length = len(path) * POSITIONS + count
        if last is not None:
            path = [*path, last]
        self._touch(path)
        if not length:
            return None
        return PagedKVCache(self._pool, context, window, [node.block for node in path if node.block], length)

    def clear(self) -> None:
        """Forget all sequences; blocks that nobody else has are free."""
        while self._nodes:
            self._evict()

    def _find(self, ids: Tokens) -> tuple[list[_Node], _Node | None, int]:
        """The nodes of the whole blocks that `ids` begin with; the next node that has some more, and how many."""
        node, path, begin = self._root, list[_Node](), 0
        while (child := node.children.get(ids[begin : begin + POSITIONS])) is not None and len(
            child.tokens
        ) == POSITIONS:
            path.append(child)
            node, begin = child, begin + POSITIONS
        rest = ids[begin : begin + POSITIONS]
        if not rest or not node.order:
            return path, None, 0
        at = bisect_left(node.order, rest)
        beside = node.order[max(at - 1, 0) : at + 1]
        best = max(beside, key=lambda tokens: common(tokens, rest))
        count = common(best, rest)
        return path, node.children[best] if count else None, count

    def _child(self, node: _Node, tokens: Tokens, block: Block | None) -> _Node | None:
        """The child with these tokens, or with more where they fill no block; made if there is none.

        None where the block was given back.
        """
        child = node.children.get(tokens)
        if child is not None or block is None:
            return child
        at = bisect_left(node.order, tokens)
        if at < len(node.order) and node.order[at][: len(tokens)] == tokens:
            return node.children[node.order[at]]
        if at and tokens[: len(node.order[at - 1])] == node.order[at - 1]:
            self._remove(node.children[node.order[at - 1]])  # it has no child: it is not full
        child = _Node(tokens, block, node)
        block.holders += 1
        node.children[tokens] = child
        insort(node.order, tokens)
        return child

    def _touch(self, path: Sequence[_Node]) -> None:
        """Note that these nodes, from the root on, are used now."""
        for node in reversed(path):  # so that parents are younger than their children
            self._nodes[node] = None
            self._nodes.move_to_end(node)

    def _evict(self) -> None:
        """Forget the least recently used node, which is a leaf."""
        self._remove(next(iter(self._nodes)))

    def _remove(self, node: _Node) -> None:
        assert not node.children
        assert node.parent is not None
        assert node.block is not None
        del node.parent.children[node.tokens]
        node.parent.order.pop(bisect_left(node.parent.order, node.tokens))
        self._nodes.pop(node, None)
        node.block.holders -= 1
        node.block = None

    def _reclaim(self) -> bool:
        """Forget nodes until a block is free; False where the tree is empty."""
        while self._nodes:
            node = next(iter(self._nodes))
            free = node.block is not None and node.block.holders == 1
            self._remove(node)
            if free:
                return True
        return False


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
