"""Matrix products from 16-bit weights where they lie: the dense layers on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fiddler.kernels.grouped import grouped_products
from fiddler.kernels.layout import Groups, group_tokens, pack, room_for, sums_for
from fiddler.kernels.product import Product
from fiddler.kernels.tasks import new_queue
from fiddler.kernels.threads import threads_for

__all__ = ["linear", "linears"]


def linear(x: np.ndarray, w: np.ndarray, product: Product) -> np.ndarray:
    """x . w transposed: float32 [T, N].

    x: float32 [T, K]; w: uint16 bits [N, K], possibly a read-only mapping; `product` says how they are read and
    whether x is rounded to bf16 first.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    return linears(x, [w], product)[0]


def linears(x: np.ndarray, weights: Sequence[np.ndarray], product: Product) -> list[np.ndarray]:
    """`linear` of one x with several weights, which is prepared for the products once."""
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, K]")
    tokens, width = x.shape
    for w in weights:
        if w.ndim != 2 or w.dtype != np.uint16 or w.shape[1] != width or not w.flags.c_contiguous:
            raise ValueError(f"w is {w.dtype} {w.shape}; expected contiguous uint16 bits [N, {width}]")
    results = [np.empty((tokens, w.shape[0]), np.float32) for w in weights]
    if tokens == 0:
        return results
    groups = _one_group(product, tokens, width)
    given = room_for(product, groups, width, "x")
    with threads_for(tokens * sum(w.size for w in weights)) as threads:
        pack(product, x, groups, given)
        for w, y in zip(weights, results, strict=True):
            address, outputs = np.array([w.ctypes.data]), w.shape[0]
            sums = sums_for(product, threads, 1, outputs, tokens)
            grouped_products(product, address, outputs, width, groups, given, given, y, sums, new_queue())
    return results


@lru_cache(maxsize=64)
def _one_group(product: Product, tokens: int, width: int) -> Groups:
    """Every token with a share of 1 in the one matrix there is."""
    ids, share = np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32)
    return group_tokens(product, ids, share, np.array([width]), (width,))
