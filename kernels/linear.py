"""One matrix product from 16-bit weights where they lie: the dense layers on the CPU."""

from __future__ import annotations

import numpy as np

from fiddler.kernels.grouped import grouped_products
from fiddler.kernels.layout import group_tokens, pack, padded_width, place
from fiddler.kernels.product import Product
from fiddler.kernels.tasks import new_queue, task_rows
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
    token, share = np.arange(tokens), np.ones(tokens, np.float32)
    groups = group_tokens(product, np.array([tokens]), (width,))
    expert, first, packed = groups.expert, groups.first, groups.packed
    at, words = place(product, groups, width)
    stride = padded_width(product, width)
    with threads_for(tokens * w.size) as threads:
        pack(product, x, token, first, packed, at, words, stride)
        tasks, weights, none = (task_rows(product, tokens, outputs, threads), threads), np.array([w.ctypes.data]), words
        grouped_products(
            product,
            weights,
            outputs,
            width,
            expert,
            first,
            packed,
            words,
            at,
            stride,
            (none, at, stride),
            (token, share, y),
            tasks,
            new_queue(),
        )
    return y
