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
from fiddler.kernels.layout import Activations, Groups
from fiddler.kernels.matmul import block_product
from fiddler.kernels.product import Product, in_pairs, panel_tokens
from fiddler.kernels.tasks import take_task
from fiddler.kernels.tiles import store_activation, store_pairs

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
                word, low = panel * (hidden // 2) + (begin + r) // 2 * wide - panel, a.ctypes.data + 4 * r * a.shape[1]
                for m in range(panel, panel + wide, 16):
                    store_pairs(h, word + m, low + 4 * m, low + 4 * (m + a.shape[1]))
        else:
            for r in range(rows):
                word = panel * hidden + (begin + r) * wide - panel
                for m in range(panel, panel + wide):
                    store_activation(product, h, word + m, a[r, m])


@njit(nogil=True, boundscheck=False, fastmath=FASTMATH)
def _add(c: np.ndarray, rows: int, token: np.ndarray, share: np.ndarray, y: np.ndarray, begin: int) -> None:
    """y[token, begin + r] += share * c[r, m], in squares, so that both sides stay in the first-level cache."""
    for first in range(0, token.size, 16):
        last = min(first + 16, token.size)
        for top in range(0, rows, 16):
            bottom = min(top + 16, rows)
            for m in range(first, last):
                t, weight = token[m], share[m]
                for r in range(top, bottom):
                    y[t, begin + r] += weight * c[r, m]


@kernel
def grouped_products(
    product: Product,
    weights: np.ndarray,
    outputs: int,
    width: int,
    groups: Groups,
    x: Activations,
    hidden: Activations,
    y: np.ndarray,
    sums: np.ndarray,
    queue: np.ndarray,
) -> None:
    """Products of matrices [E, outputs, width], whose addresses `weights` holds, with every group's activations x.

    Two addresses: hidden = silu(first . x) * (second . x), with x's groups, for the rows that `groups.hidden` says.
    One: y[t] = sum over the groups that token t is in of its share . w[expert] . x[t], for y [T, outputs], over so
    many elements of each row as `groups.hidden` says.
    `sums`: float32 [threads, matrices, weight rows of a task, tokens]; so many threads take tasks from `queue`.
    """
    first = groups.first
    threads, _, task, ldc = sums.shape
    for thread in prange(threads):
        c = sums[thread]
        block = take_task(queue.ctypes.data)
        while block * task < outputs:
            begin = block * task
            if weights.size == 1:
                y[:, begin : begin + min(task, outputs - begin)] = 0
            for g in range(groups.expert.size):
                count, packed, used = first[g + 1] - first[g], groups.packed[g], groups.hidden[g]
                rows = min(task, outputs - begin)
                k = used
                if weights.size == 2:
                    rows, k = min(rows, used - begin), width
                    if rows <= 0:
                        continue
                given = x.words.ctypes.data + 4 * x.at[g]
                offset = 2 * (groups.expert[g] * outputs + begin) * width
                for i in range(weights.size):
                    made = c.ctypes.data + 4 * i * task * ldc
                    block_product(
                        product, packed, weights[i] + offset, width, rows, given, x.stride, count, k, made, ldc
                    )
                if weights.size == 2:
                    _gate(c[0], c[1], rows, (count + 15) // 16 * 16 if packed else count)
                    h = hidden.words.ctypes.data + 4 * hidden.at[g]
                    _store_hidden(product, packed, c[0], begin, rows, count, h, used, hidden.stride)
                else:
                    _add(
                        c[0],
                        rows,
                        groups.token[first[g] : first[g + 1]],
                        groups.share[first[g] : first[g + 1]],
                        y,
                        begin,
                    )
            block = take_task(queue.ctypes.data)
