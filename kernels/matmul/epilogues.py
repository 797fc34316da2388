"""The epilogues of a product: biases, SwiGLU stored as the next product's activations, and a token's weighted sum.

Knows one task's sums and both activation layouts; no weights.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS
from fiddler.kernels.codegen.scalar_math import silu
from fiddler.kernels.codegen.variant import KernelVariant, bf16_pairs, int8_packed, int8_rows, panel_tokens
from fiddler.kernels.matmul.int8_activations import GROUP_WORDS, store_int8_column, store_int8_columns_packed
from fiddler.kernels.matmul.stores import load_float, store_activation, store_pairs, store_word

__all__ = ["CLAMPED", "PLAIN", "SWIGLU", "add_bias", "add_weighted", "clamped_swiglu", "store_hidden", "swiglu"]

PLAIN, SWIGLU, CLAMPED = 0, 1, 2
"""How a product's first two matrices become hidden activations: not at all; see `swiglu`; see `clamped_swiglu`."""


@njit(**OPTIONS, fastmath=FASTMATH)
def swiglu(a: np.ndarray, b: np.ndarray, rows: int, columns: int) -> None:
    """a = silu(a) * b: only arithmetic on arrays, so that LLVM vectorises it."""
    for r in range(rows):
        for m in range(columns):
            a[r, m] = silu(a[r, m]) * b[r, m]


@njit(**OPTIONS, fastmath=FASTMATH)
def clamped_swiglu(a: np.ndarray, b: np.ndarray, rows: int, columns: int) -> None:
    """a = g * sigmoid(1.702 g) * (u + 1), g = min(a, 7), u = b between -7 and 7, as in gpt-oss."""
    for r in range(rows):
        for m in range(columns):
            g = min(a[r, m], np.float32(7.0))
            u = min(max(b[r, m], np.float32(-7.0)), np.float32(7.0))
            a[r, m] = silu(np.float32(1.702) * g) * np.float32(1 / 1.702) * (u + np.float32(1.0))


@njit(**OPTIONS, fastmath=FASTMATH)
def add_bias(a: np.ndarray, rows: int, columns: int, bias: int) -> None:
    """a[r, m] += the r-th float32 from the address `bias`."""
    for r in range(rows):
        value = load_float(bias, r)
        for m in range(columns):
            a[r, m] += value


@njit(**OPTIONS)
def store_hidden(
    variant: KernelVariant,
    packed: bool,
    a: np.ndarray,
    begin: int,
    rows: int,
    tokens: int,
    h: int,
    hidden: int,
    width: int,
    stride: int,
) -> None:
    """Write rows [begin, begin + rows) of the hidden activations, a [rows, tokens], to address h in its layout.

    hidden: how many there are; width: for how many the rows layout has space.
    """
    if not packed and int8_rows(variant):
        for m in range(tokens):
            for r in range(0, rows, 32):
                source = a.ctypes.data + 4 * (r * a.shape[1] + m)
                store_int8_column(h + m * stride, width, begin + r, source, 4 * a.shape[1])
        return
    if not packed:
        for m in range(tokens):
            for r in range(rows):
                store_activation(variant, h, m * stride + begin + r, a[r, m])
        return
    panel_width = panel_tokens(variant)
    padded = (tokens + 15) // 16 * 16
    for panel in range(0, padded, panel_width):
        wide = min(panel_width, padded - panel)
        if int8_packed(variant):
            for r in range(0, rows, 32):
                group = h + 4 * GROUP_WORDS * (panel * (hidden // 32) + (begin + r) // 32 * wide)
                for m in range(0, wide, 16):
                    source = a.ctypes.data + 4 * (r * a.shape[1] + panel + m)
                    store_int8_columns_packed(group + 4 * m, wide, source, 4 * a.shape[1])
        elif bf16_pairs(variant):
            for r in range(0, rows, 2):
                word, low = panel * (hidden // 2) + (begin + r) // 2 * wide - panel, a.ctypes.data + 4 * r * a.shape[1]
                for m in range(panel, panel + wide, 16):
                    store_pairs(h, word + m, low + 4 * m, low + 4 * (m + a.shape[1]))
        else:
            for r in range(rows):
                word = panel * hidden + (begin + r) * wide - panel
                for m in range(panel, panel + wide):
                    store_word(variant, h, word + m, a[r, m])


@njit(**OPTIONS, fastmath=FASTMATH)
def add_weighted(
    c: np.ndarray, rows: int, token: np.ndarray, routing_weights: np.ndarray, y: np.ndarray, begin: int
) -> None:
    """y[token, begin + r] += routing weight * c[r, m], in squares: both sides stay in the first-level cache."""
    for first in range(0, token.size, 16):
        last = min(first + 16, token.size)
        for top in range(0, rows, 16):
            bottom = min(top + 16, rows)
            for m in range(first, last):
                t, weight = token[m], routing_weights[m]
                for r in range(top, bottom):
                    y[t, begin + r] += weight * c[r, m]
