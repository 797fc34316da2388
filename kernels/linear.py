"""One matrix product from 16-bit weights where they lie: the dense layers on the CPU."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from fiddler.kernels.matmul import FASTMATH, block_product, pack, padded_width, takes_packed, words_for
from fiddler.kernels.tiles import Product

__all__ = ["linear"]

_ROWS = 32  # weight rows a task


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
    tokens, width = x.shape
    y = np.empty((tokens, w.shape[0]), np.float32)
    if tokens == 0:
        return y
    count = np.array([tokens])
    packed = takes_packed(product, count, width)
    xs = np.empty(int(words_for(product, count, packed, width)[0]), np.uint32)
    at = np.zeros(1, np.int64)
    x_row = padded_width(product, width)
    pack(product, x, np.arange(tokens), np.array([0, tokens]), packed, at, xs, x_row)
    _linear(product, w, bool(packed[0]), xs, x_row, y)
    return y


@njit(parallel=True, nogil=True, cache=True, boundscheck=False, fastmath=FASTMATH)
def _linear(product: Product, w: np.ndarray, packed: bool, xs: np.ndarray, x_row: int, y: np.ndarray) -> None:
    rows, width = w.shape
    count = y.shape[0]
    ldc = (count + 15) // 16 * 16
    ldx = ldc if packed else x_row
    for block in prange((rows + _ROWS - 1) // _ROWS):
        begin = block * _ROWS
        here = min(_ROWS, rows - begin)
        c = np.empty((_ROWS, ldc), np.float32)
        block_product(
            product, packed, w.ctypes.data + 2 * begin * width, width, here, xs.ctypes.data, ldx, count, width, c.ctypes.data, ldc
        )
        for m in range(count):
            for r in range(here):
                y[m, begin + r] = c[r, m]
