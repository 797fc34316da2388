"""How activations lie in memory between the products, and gathering them into that.

Activations are kept in one of two layouts, counted in 4-byte words:
*rows*: one token after another (bf16 pairs: an odd width is padded by one element), for few tokens;
*packed*: panels of tokens, one after another; a panel is words [its tokens' width, its tokens]. Entry (p, t) is the
bf16 elements 2p and 2p + 1 of token t, or, where activations are float32, its element p. The last panel may be
narrower; tokens are padded to a multiple of 16.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import prange

from fiddler.kernels.jit import kernel
from fiddler.kernels.product import Product, in_pairs, panel_tokens
from fiddler.kernels.tasks import task_rows
from fiddler.kernels.tiles import store_activation, store_pair

__all__ = ["Activations", "Groups", "group_tokens", "pack", "room_for", "sums_for"]

_FEW = 4  # tokens; more are faster packed
_FEW_FOR_TILES, _BESIDE = 2, 32  # likewise with tile registers; and from how many packed ones on, beside them


class Groups(NamedTuple):
    """Tokens that meet the same expert's weights in one layout: group g is `token[first[g] : first[g + 1]]`.

    An expert may have two groups, one after the other: whole vectors of tokens packed, and the few that remain.
    """

    expert: np.ndarray  # int64 [G]
    first: np.ndarray  # int64 [G + 1]
    packed: np.ndarray  # bool [G]
    hidden: np.ndarray  # int64 [G]: the hidden rows of the expert that are computed, from the first on
    token: np.ndarray  # int64 [A]
    share: np.ndarray  # float32 [A]: how much of the expert's output the token gets


class Activations(NamedTuple):
    """The activations of all groups, each in its layout."""

    words: np.ndarray  # uint32
    at: np.ndarray  # int64 [G]: where each group's begin
    stride: int  # elements from one token to the next in the rows layout


def group_tokens(
    product: Product, ids: np.ndarray, weights: np.ndarray, hidden: np.ndarray, widths: Sequence[int]
) -> Groups:
    """Groups of the tokens with these experts, int [T, K] and float32 [T, K], for products of these `widths`.

    `hidden`: int64 [E], how many hidden rows of each expert are computed; one with none has no group.
    """
    flat = ids.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")  # assignments, grouped by expert
    counts = np.bincount(flat, minlength=hidden.size)
    if not hidden.all():
        order = order[hidden[flat[order]] > 0]
        counts[hidden == 0] = 0
    packs = not product.in_pairs or all(width % 2 == 0 for width in widths)
    expert, sizes, packed = [], [], []
    for e in np.flatnonzero(counts).tolist():
        count = int(counts[e])
        rest = count if not packs else 0
        if packs and product.in_tiles and (count <= _FEW_FOR_TILES or count > _BESIDE):
            rest = count % 16 if count % 16 <= _FEW_FOR_TILES else 0
        elif packs and not product.in_tiles:
            rest = count % 16 if count % 16 <= _FEW else 0
        for size, is_packed in ((count - rest, True), (rest, False)):
            if size:
                expert.append(e)
                sizes.append(size)
                packed.append(is_packed)
    first = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    share = weights.reshape(-1).astype(np.float32)[order]
    which = np.array(expert, np.int64)
    return Groups(which, first, np.array(packed, np.bool_), hidden[which], order // max(ids.shape[1], 1), share)


def room_for(product: Product, groups: Groups, width: int, use: str) -> Activations:
    """Uninitialised activations of `width` elements a token; they are this thread's until its next call for `use`.

    Every group begins at a cache line.
    """
    stride = width + width % 2 if product.in_pairs else width
    words = stride // 2 if product.in_pairs else stride
    at, end = [], 0
    for count, packed in zip(np.diff(groups.first).tolist(), groups.packed.tolist(), strict=True):
        at.append(end)
        padded = -(-count // 16) * 16 if packed else count
        end += -(-padded * words // 16) * 16
    return Activations(_workspace.words(use, end), np.array(at, np.int64), stride)


class _Workspace(threading.local):
    """Memory that is used again by the next call from the same thread: fresh pages cost as much as a product.

    It is as large as the largest call has needed.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def words(self, use: str, count: int) -> np.ndarray:
        """An uninitialised uint32 [count] that begins at a cache line, the same memory for the same use."""
        memory = self._memory.get(use)
        if memory is None or memory.size < count + 15:
            memory = self._memory[use] = np.empty(count + 15, np.uint32)
        begin = -(memory.ctypes.data // 4) % 16
        return memory[begin : begin + count]


_workspace = _Workspace()


def sums_for(product: Product, threads: int, matrices: int, outputs: int, tokens: int) -> np.ndarray:
    """Where each thread keeps the sums of a task: float32 [threads, matrices, weight rows of a task, tokens and more].

    For matrices of `outputs` rows and groups of at most `tokens`. A row is a vector longer than they need, else rows
    that lie a power of two apart would share their places in the cache.
    """
    rows, row = task_rows(product, tokens, outputs, threads), -(-tokens // 16) * 16 + 16
    words = _workspace.words("sums", threads * matrices * rows * row)
    return words.view(np.float32).reshape(threads, matrices, rows, row)


@kernel
def pack(product: Product, x: np.ndarray, groups: Groups, into: Activations) -> None:
    """Gather rows of x [T, K] float32, group by group, each group in its layout."""
    first, token = groups.first, groups.token
    width = x.shape[1]
    panel_width = panel_tokens(product)
    for block in prange((width + 15) // 16):
        begin, end = block * 16, min(block * 16 + 16, width)
        for g in range(first.size - 1):
            count = first[g + 1] - first[g]
            start = into.words.ctypes.data + 4 * into.at[g]
            if not groups.packed[g]:
                for m in range(count):
                    source = token[first[g] + m]
                    for i in range(begin, end):
                        store_activation(product, start, m * into.stride + i, x[source, i])
                continue
            padded = (count + 15) // 16 * 16
            row = width // 2 if in_pairs(product) else width
            for panel in range(0, padded, panel_width):
                wide = min(panel_width, padded - panel)
                for m in range(panel, panel + wide):
                    word = panel * row + m - panel
                    source = token[first[g] + min(m, count - 1)]  # what pads is computed and never read
                    if in_pairs(product):
                        for p in range(begin // 2, end // 2):
                            store_pair(start, word + p * wide, x[source, 2 * p], x[source, 2 * p + 1])
                    else:
                        for p in range(begin, end):
                            store_activation(product, start, word + p * wide, x[source, p])
