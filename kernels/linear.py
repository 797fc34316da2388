"""One matrix product from 16-bit weights where they lie: the dense layers on the CPU."""

from __future__ import annotations

import numpy as np

from fiddler.kernels.grouped import grouped_products
from fiddler.kernels.layout import group_tokens, pack, room_for, sums_for
from fiddler.kernels.product import Product
from fiddler.kernels.tasks import new_queue
from fiddler.kernels.threads import threads_for

__all__ = ["linear"]


def linear(x: np.ndarray, w: np.ndarray, product: Product) -> np.ndarray:
    """x . w transposed: float32 [T, N].

    x: float32 [T, K]; w: uint16 bits [N, K], possibly a read-only mapping; `product` says how they are read and
    whether x is rounded to bf16 first.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, K]")
    if w.ndim != 2 or w.dtype != np.uint16 or w.shape[1] != x.shape[1] or not w.flags.c_contiguous:
        raise ValueError(f"w is {w.dtype} {w.shape}; expected contiguous uint16 bits [N, {x.shape[1]}]")
    tokens, width, outputs = *x.shape, w.shape[0]
    y = np.empty((tokens, outputs), np.float32)
    if tokens == 0:
        return y
    # every token with a share of 1 in the one matrix there is
    all_tokens = (tokens, 1)
    groups = group_tokens(product, np.zeros(all_tokens, np.int64), np.ones(all_tokens, np.float32), 1, (width,))
    given = room_for(product, groups, width, "x")
    with threads_for(tokens * w.size) as threads:
        pack(product, x, groups, given)
        sums = sums_for(product, threads, 1, outputs, tokens)
        grouped_products(product, np.array([w.ctypes.data]), outputs, width, groups, given, given, y, sums, new_queue())
    return y
