"""How activations lie in memory between the products, and gathering them into that.

Activations are kept in one of two layouts, counted in 4-byte words:
*rows*: one token after another (bf16 pairs: an odd width is padded by one element), for few tokens;
*packed*: panels of tokens, one after another; a panel is words [its tokens' width, its tokens]. Entry (p, t) is the
bf16 elements 2p and 2p + 1 of token t, or, where activations are float32, its element p. The last panel may be
narrower; tokens are padded to a multiple of 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import prange

from fiddler.kernels.jit import kernel
from fiddler.kernels.product import Product, in_pairs, panel_tokens
from fiddler.kernels.tiles import store_activation, store_pair

__all__ = ["Groups", "aligned_words", "group_tokens", "pack", "padded_width", "place"]

_FEW = 4  # tokens; more are faster packed


@dataclass(frozen=True)
class Groups:
    """Tokens that meet the same expert's weights in one layout: group g is `token[first[g] : first[g + 1]]`.

    An expert may have two groups, one after the other: whole vectors of tokens packed, and the few that remain.
    """

    expert: np.ndarray  # int64 [G]
    first: np.ndarray  # int64 [G + 1]
    packed: np.ndarray  # bool [G]

    @property
    def counts(self) -> np.ndarray:
        """Tokens of each group: int64 [G]."""
        return np.diff(self.first)


def group_tokens(product: Product, counts: np.ndarray, widths: Sequence[int]) -> Groups:
    """Groups for experts with these numbers of tokens (int64 [E], 0 for none), whose products have these `widths`."""
    packs = not product.in_pairs or all(width % 2 == 0 for width in widths)
    expert, sizes, packed = [], [], []
    for e in np.flatnonzero(counts).tolist():
        count = int(counts[e])
        rest = count % 16 if packs and count % 16 <= _FEW else 0 if packs else count
        for size, is_packed in ((count - rest, True), (rest, False)):
            if size:
                expert.append(e)
                sizes.append(size)
                packed.append(is_packed)
    first = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
    return Groups(np.array(expert, np.int64), first, np.array(packed, np.bool_))


def padded_width(product: Product, width: int) -> int:
    """Elements from one token to the next in the rows layout."""
    return width + width % 2 if product.in_pairs else width


def place(product: Product, groups: Groups, width: int) -> tuple[np.ndarray, np.ndarray]:
    """At which word each group's activations of `width` elements begin (int64 [G]), and room for all of them.

    Every group begins at a cache line.
    """
    counts, row = groups.counts, padded_width(product, width) // (2 if product.in_pairs else 1)
    padded = np.where(groups.packed, -(-counts // 16) * 16, counts)
    ends = np.cumsum(-(-padded * row // 16) * 16)
    return np.concatenate(([0], ends[:-1])), aligned_words(int(ends[-1]))


def aligned_words(count: int) -> np.ndarray:
    """An uninitialised uint32 [count] that begins at a cache line."""
    memory = np.empty(count + 15, np.uint32)
    begin = -(memory.ctypes.data // 4) % 16
    return memory[begin : begin + count]


@kernel
def pack(
    product: Product,
    x: np.ndarray,
    token: np.ndarray,
    first: np.ndarray,
    packed: np.ndarray,
    at: np.ndarray,
    words: np.ndarray,
    stride: int,
) -> None:
    """Gather rows of x [T, K] float32 into `words`, group by group, each group in its layout.

    Group g is the tokens `token[first[g] : first[g + 1]]`; it starts at word `at[g]`. `stride`: elements from one
    token to the next in the rows layout.
    """
    width = x.shape[1]
    base = words.ctypes.data
    panel_width = panel_tokens(product)
    for block in prange((width + 15) // 16):
        begin, end = block * 16, min(block * 16 + 16, width)
        for g in range(first.size - 1):
            count = first[g + 1] - first[g]
            start = base + 4 * at[g]
            if not packed[g]:
                for m in range(count):
                    source = token[first[g] + m]
                    for i in range(begin, end):
                        store_activation(product, start, m * stride + i, x[source, i])
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
