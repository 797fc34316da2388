"""Products of a block of weight rows with many tokens, built from register tiles; and packing of the tokens.

Compiled pieces that both kernels share. Works on addresses that its callers have validated: no bounds checks.

Activations are kept in one of two layouts, counted in 4-byte words:
*rows*: one token after another (bf16 pairs: an odd width is padded by one element);
*packed*: panels of PANEL tokens, one after another; a panel is bf16 pairs [K/2, its tokens], entry (p, t) holds
elements 2p and 2p + 1 of token t. The last panel may be narrower; tokens are padded to a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from fiddler.kernels.jit import kernel
from fiddler.kernels.product import Product, activation_bytes, in_pairs, many_registers
from fiddler.kernels.tiles import dot_tile, outer_tile, store_activation, store_float, store_pair

__all__ = [
    "PANEL",
    "aligned_words",
    "block_product",
    "pack",
    "padded_width",
    "read_only",
    "silu",
    "takes_packed",
    "task_rows",
    "weighted_products",
    "words_for",
]

FEW_ROWS, MANY_ROWS = 32, 128
"""Weight rows of one task, for few and for many tokens; even, so that a pair of rows stays in one task."""

PANEL = 48
"""Tokens of a panel in the packed layout: three vectors, which with eight weight rows fill 24 registers with sums."""

_BLOCK_PAIRS = 1024  # of K at once: a panel of 48 tokens is then 192 KB
_PACK_FROM = 16  # tokens; below it the dot-product tiles are faster


def task_rows(tokens: int) -> int:
    """Weight rows of one task where an expert has at most `tokens`: many tokens are read again for every task."""
    return FEW_ROWS if tokens <= PANEL else MANY_ROWS


def takes_packed(product: Product, tokens: np.ndarray, *widths: int) -> np.ndarray:
    """For each number of tokens, whether activations of these `widths` go through the packed layout."""
    return (tokens >= _PACK_FROM) & (product.in_pairs and all(width % 2 == 0 for width in widths))


def padded_width(product: Product, width: int) -> int:
    """Elements from one token to the next in the rows layout."""
    return width + width % 2 if product.in_pairs else width


def words_for(product: Product, tokens: np.ndarray, packed: np.ndarray, width: int) -> np.ndarray:
    """For each number of tokens, the 4-byte words that so many activations of `width` elements take.

    A multiple of a vector's 16, so that what follows is aligned as this is.
    """
    row = padded_width(product, width) // 2 if product.in_pairs else width
    return np.where(packed, width // 2 * (-(-tokens // 16) * 16), -(-tokens * row // 16) * 16)


def read_only(bits: np.ndarray) -> np.ndarray:
    """A view that cannot be written, as a mapping is: to Numba an array that can is another type, compiled anew."""
    view = bits.view()
    view.flags.writeable = False
    return view


def aligned_words(count: int) -> np.ndarray:
    """An uninitialised uint32 [count] that begins at a cache line."""
    memory = np.empty(count + 15, np.uint32)
    begin = -(memory.ctypes.data // 4) % 16
    return memory[begin : begin + count]


@intrinsic
def _float_of(_context: Any, bits: Any) -> Any:
    """uint32 bits -> the float32 they spell."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def silu(value: np.float32) -> np.float32:
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
    for block in prange((width + 15) // 16):
        begin, end = block * 16, min(block * 16 + 16, width)
        for g in range(first.size - 1):
            count = first[g + 1] - first[g]
            start = base + 4 * at[g]
            if packed[g]:
                padded = (count + 15) // 16 * 16
                for panel in range(0, padded, PANEL):
                    wide = min(PANEL, padded - panel)
                    base_word = at[g] + panel * (width // 2)
                    for m in range(panel, panel + wide):
                        for p in range(begin // 2, end // 2):
                            word = base_word + p * wide + m - panel
                            if m < count:
                                source = token[first[g] + m]
                                store_pair(base, word, x[source, 2 * p], x[source, 2 * p + 1])
                            else:
                                words[word] = np.uint32(0)
            else:
                for m in range(count):
                    source = token[first[g] + m]
                    for i in range(begin, end):
                        store_activation(product, start, m * stride + i, x[source, i])


@njit(nogil=True, boundscheck=False)
def block_product(
    product: Product,
    packed: bool,
    w: int,
    ldw: int,
    rows: int,
    x: int,
    ldx: int,
    tokens: int,
    k: int,
    c: int,
    ldc: int,
) -> None:
    """c[r * ldc + t] = w[r] . x[t] over k elements, for r < rows and t < tokens.

    `w`, `x`, `c`: addresses; `ldw`: elements from one weight row to the next; `ldx`: elements from one token to
    the next in the rows layout, or the padded number of tokens in the packed one, where c is written up to it.
    """
    if in_pairs(product) and packed:
        _outers(product, w, ldw, rows, x, ldx, k, c, ldc)
    elif many_registers(product):
        _dots_of_32_registers(product, w, ldw, rows, x, ldx, tokens, k, c, ldc)
    else:
        _dots_of_16_registers(product, w, ldw, rows, x, ldx, tokens, k, c, ldc)


@njit(nogil=True, boundscheck=False)
def _dots_of_32_registers(
    product: Product, w: int, ldw: int, rows: int, x: int, ldx: int, tokens: int, k: int, c: int, ldc: int
) -> None:
    width = activation_bytes(product)
    for r in range(0, rows - rows % 4, 4):
        wr, cr = w + 2 * r * ldw, c + 4 * r * ldc
        m = 0
        while m + 6 <= tokens:
            dot_tile(product, 4, 6, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
            m += 6
        if m + 4 <= tokens:
            dot_tile(product, 4, 4, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
            m += 4
        if m + 2 <= tokens:
            dot_tile(product, 4, 2, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
            m += 2
        if m < tokens:
            dot_tile(product, 4, 1, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
    for r in range(rows - rows % 4, rows):
        wr, cr = w + 2 * r * ldw, c + 4 * r * ldc
        for m in range(tokens):
            dot_tile(product, 1, 1, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)


@njit(nogil=True, boundscheck=False)
def _dots_of_16_registers(
    product: Product, w: int, ldw: int, rows: int, x: int, ldx: int, tokens: int, k: int, c: int, ldc: int
) -> None:
    width = activation_bytes(product)
    for r in range(0, rows - rows % 4, 4):
        wr, cr = w + 2 * r * ldw, c + 4 * r * ldc
        m = 0
        while m + 2 <= tokens:
            dot_tile(product, 4, 2, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
            m += 2
        if m < tokens:
            dot_tile(product, 4, 1, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)
    for r in range(rows - rows % 4, rows):
        wr, cr = w + 2 * r * ldw, c + 4 * r * ldc
        for m in range(tokens):
            dot_tile(product, 1, 1, wr, ldw, x + m * ldx * width, ldx, cr + 4 * m, ldc, k)


@njit(nogil=True, boundscheck=False)
def _outers(product: Product, w: int, ldw: int, rows: int, x: int, padded: int, k: int, c: int, ldc: int) -> None:
    """In blocks of K, so that a panel's part stays in the second-level cache while the rows go by."""
    pairs = k // 2
    whole = rows - rows % 8
    for r in range(rows):
        for m in range(padded):
            store_float(c, r * ldc + m, np.float32(0))
    for begin in range(0, pairs, _BLOCK_PAIRS):
        count = min(_BLOCK_PAIRS, pairs - begin)
        for m in range(0, padded, PANEL):
            wide = min(PANEL, padded - m)
            panel, row, sums = x + 4 * (m * pairs + begin * wide), w + 4 * begin, c + 4 * m
            if wide == 48:
                for r in range(0, whole, 8):
                    outer_tile(product, 8, 3, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)
                for r in range(whole, rows):
                    outer_tile(product, 1, 3, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)
            elif wide == 32:
                for r in range(0, whole, 8):
                    outer_tile(product, 8, 2, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)
                for r in range(whole, rows):
                    outer_tile(product, 1, 2, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)
            else:
                for r in range(0, whole, 8):
                    outer_tile(product, 8, 1, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)
                for r in range(whole, rows):
                    outer_tile(product, 1, 1, row + 2 * r * ldw, ldw, panel, wide, sums + 4 * r * ldc, ldc, count)


@kernel
def weighted_products(
    product: Product,
    w: np.ndarray,
    experts: np.ndarray,
    first: np.ndarray,
    packed: np.ndarray,
    token: np.ndarray,
    share: np.ndarray,
    at: np.ndarray,
    words: np.ndarray,
    stride: int,
    task: int,
    y: np.ndarray,
) -> None:
    """y[t] = sum over the groups g that token t is in of share . w[experts[g]] . x[t], for w [E, N, K] and y [T, N].

    Group g is the tokens `token[first[g] : first[g + 1]]` with their `share`; their activations start at word
    `at[g]` of `words`, in the group's layout, `stride` elements apart in the rows layout. `task`: rows of w a task.
    """
    outputs, width = w.shape[1], w.shape[2]
    most = 0
    for g in range(experts.size):
        most = max(most, first[g + 1] - first[g])
    ldc = (most + 15) // 16 * 16
    for block in prange((outputs + task - 1) // task):
        begin = block * task
        rows = min(task, outputs - begin)
        c = np.empty((task, ldc), np.float32)
        for t in range(y.shape[0]):
            for r in range(rows):
                y[t, begin + r] = np.float32(0)
        for g in range(experts.size):
            count = first[g + 1] - first[g]
            ldx = (count + 15) // 16 * 16 if packed[g] else stride
            row = w.ctypes.data + 2 * (experts[g] * outputs + begin) * width
            x = words.ctypes.data + 4 * at[g]
            block_product(product, packed[g], row, width, rows, x, ldx, count, width, c.ctypes.data, ldc)
            for m in range(count):
                t, weight = token[first[g] + m], share[first[g] + m]
                for r in range(rows):
                    y[t, begin + r] += weight * c[r, m]
