"""The one kernel that reads weights: products of all groups of tokens with their experts' rows, and what follows.

Two things may follow a product: with two matrices, gate and up, SiLU of the one times the other, stored as the next
product's activations; with one matrix, the sum over each token's groups, weighted. Both are in one kernel, since to
compile the products is what takes the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from fiddler.kernels.jit import FASTMATH, kernel
from fiddler.kernels.matmul import block_product
from fiddler.kernels.product import Product, in_pairs, panel_tokens
from fiddler.kernels.tasks import take_task
from fiddler.kernels.tiles import store_activation, store_pair

__all__ = ["grouped_products"]


@intrinsic
def _float_of(_context: Any, bits: Any) -> Any:
    """uint32 bits -> the float32 they spell."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def _silu(value: np.float32) -> np.float32:
    """value * sigmoid(value) in float32; plain arithmetic without calls, so that loops over it vectorise.

    exp(y) = 2**n * exp(r) with |r| <= ln(2)/2, exp(r) by its Taylor polynomial of degree 7.
    """
    y = min(max(np.float32(-value), np.float32(-87.0)), np.float32(88.0))
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = y - n * np.float32(0.693359375)  # ln(2), in two parts
    r = r + n * np.float32(2.12194440e-4)
    p = r * np.float32(1 / 5040) + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    power = _float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
    return np.float32(value / (np.float32(1.0) + p * power))


@njit(nogil=True, boundscheck=False, fastmath=FASTMATH)
def _gate(a: np.ndarray, b: np.ndarray, rows: int, used: int) -> None:
    """a = silu(a) * b: nothing but arithmetic on arrays, so that it becomes vector code."""
    for r in range(rows):
        for m in range(used):
            a[r, m] = _silu(a[r, m]) * b[r, m]


@njit(nogil=True, boundscheck=False)
def _store_hidden(
    product: Product, packed: bool, a: np.ndarray, begin: int, rows: int, tokens: int, h: int, hidden: int, stride: int
) -> None:
    """Write rows [begin, begin + rows) of the hidden activations, a [rows, tokens], at address h in its layout."""
    if not packed:
        for m in range(tokens):
            for r in range(rows):
                store_activation(product, h, m * stride + begin + r, a[r, m])
        return
    panel_width = panel_tokens(product)
    padded = (tokens + 15) // 16 * 16
    for panel in range(0, padded, panel_width):
        wide = min(panel_width, padded - panel)
        if in_pairs(product):
            for r in range(0, rows, 2):
                word = panel * (hidden // 2) + (begin + r) // 2 * wide - panel
                for m in range(panel, panel + wide):
                    store_pair(h, word + m, a[r, m], a[r + 1, m])
        else:
            for r in range(rows):
                word = panel * hidden + (begin + r) * wide - panel
                for m in range(panel, panel + wide):
                    store_activation(product, h, word + m, a[r, m])


@kernel
def grouped_products(
    product: Product,
    weights: np.ndarray,
    outputs: int,
    width: int,
    expert: np.ndarray,
    first: np.ndarray,
    packed: np.ndarray,
    xs: np.ndarray,
    x_at: np.ndarray,
    x_stride: int,
    into_hidden: tuple[np.ndarray, np.ndarray, int],
    into_y: tuple[np.ndarray, np.ndarray, np.ndarray],
    tasks: tuple[int, int],
    queue: np.ndarray,
) -> None:
    """Products of matrices [E, outputs, width], whose addresses `weights` holds, with every group's activations x.

    Two addresses: h = silu(first . x) * (second . x), into hidden = (words, where each group's begin, stride).
    One: y[t] = sum over the groups g that token t is in of share . w[expert[g]] . x[t], for (token, share, y).

    Group g is the tokens `token[first[g] : first[g + 1]]` with their `share`; their activations start at word
    `x_at[g]` of `xs`, in the group's layout (`packed` or rows, `x_stride` elements apart). `tasks`: weight rows of a
    task, and the threads that take tasks from `queue`.
    """
    hs, h_at, h_stride = into_hidden
    token, share, y = into_y
    task, threads = tasks
    most = 0
    for g in range(expert.size):
        most = max(most, first[g + 1] - first[g])
    ldc = (most + 15) // 16 * 16
    for _ in prange(threads):
        c = np.empty((weights.size, task, ldc), np.float32)
        block = take_task(queue.ctypes.data)
        while block * task < outputs:
            begin = block * task
            rows = min(task, outputs - begin)
            if weights.size == 1:
                y[:, begin : begin + rows] = 0
            for g in range(expert.size):
                count = first[g + 1] - first[g]
                x = xs.ctypes.data + 4 * x_at[g]
                offset = 2 * (expert[g] * outputs + begin) * width
                for i in range(weights.size):
                    sums = c.ctypes.data + 4 * i * task * ldc
                    block_product(
                        product, packed[g], weights[i] + offset, width, rows, x, x_stride, count, width, sums, ldc
                    )
                if weights.size == 2:
                    _gate(c[0], c[1], rows, (count + 15) // 16 * 16 if packed[g] else count)
                    h = hs.ctypes.data + 4 * h_at[g]
                    _store_hidden(product, packed[g], c[0], begin, rows, count, h, outputs, h_stride)
                else:
                    for m in range(count):
                        t, weight = token[first[g] + m], share[first[g] + m]
                        for r in range(rows):
                            y[t, begin + r] += weight * c[0, r, m]
            block = take_task(queue.ctypes.data)
