"""Products of a block of weight rows with many tokens, by outer products. Knows addresses and strides."""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    outer_rows,
    outer_tokens,
    panel_tokens,
    tuned,
)
from fiddler.kernels.formats import stored_bytes
from fiddler.kernels.matmul.outer_tiles import outer_tile, widen_row

__all__ = ["multiply_outer", "multiply_outer_floats", "outer_block", "outer_k_words"]

outer_k_words = tuned("outer_k_words")
"""K-block of an outer product [words]."""


@njit(**OPTIONS)
def outer_block(
    variant: KernelVariant, w: int, ldw: int, rows: int, x: int, wide: int, words: int, c: int, ldc: int
) -> None:
    """c += w . x for weight rows and a panel of `wide` tokens, over `words` words along K."""
    tile_rows = outer_rows(variant)
    full_rows = rows - rows % tile_rows
    m = 0
    while m < wide:
        x_at, sums = x + 4 * m, c + 4 * m
        if outer_tokens(variant) == 48 and wide - m == 48:
            for r in range(0, full_rows, tile_rows):
                outer_tile(variant, "several", 48, w + 4 * r * ldw, ldw, x_at, wide, sums + 4 * r * ldc, ldc, words)
            m += 48
        elif outer_tokens(variant) == 48 and wide - m == 32:
            for r in range(0, full_rows, tile_rows):
                outer_tile(variant, "several", 32, w + 4 * r * ldw, ldw, x_at, wide, sums + 4 * r * ldc, ldc, words)
            m += 32
        else:
            for r in range(0, full_rows, tile_rows):
                outer_tile(variant, "several", 16, w + 4 * r * ldw, ldw, x_at, wide, sums + 4 * r * ldc, ldc, words)
            m += 16
    for r in range(full_rows, rows):  # few, if any: not worth compiling tiles for more tokens
        for m in range(0, wide, 16):
            outer_tile(variant, "one", 16, w + 4 * r * ldw, ldw, x + 4 * m, wide, c + 4 * (r * ldc + m), ldc, words)


def multiply_outer(
    variant: KernelVariant,
    w: int,
    ldw: int,
    rows: int,
    x: int,
    padded: int,
    k: int,
    c: int,
    ldc: int,
    next_offset: int,
    scratch: int,
) -> None:
    """c += w . x in bf16 pairs, straight from the weights."""
    panel_width, words, stride = panel_tokens(variant), k // 2, ldw // 2
    for begin in range(0, words, outer_k_words(variant)):
        count = min(outer_k_words(variant), words - begin)
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            outer_block(
                variant, w + 4 * begin, stride, rows, x + 4 * (m * words + begin * wide), wide, count, c + 4 * m, ldc
            )


def multiply_outer_floats(
    variant: KernelVariant,
    w: int,
    ldw: int,
    rows: int,
    x: int,
    padded: int,
    k: int,
    c: int,
    ldc: int,
    next_offset: int,
    scratch: int,
) -> None:
    """c += w . x in float32: widens a few rows at a time into `scratch`, which stays in the first-level cache."""
    panel_width, tile_rows, k_block = panel_tokens(variant), outer_rows(variant), outer_k_words(variant)
    for begin in range(0, k, k_block):
        count = min(k_block, k - begin)
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel = x + 4 * (m * k + begin * wide)
            for r in range(0, rows, tile_rows):
                row_count = min(tile_rows, rows - r)
                for i in range(row_count):
                    widen_row(
                        variant,
                        w + stored_bytes(variant, (r + i) * ldw + begin),
                        scratch + 4 * i * k_block,
                        count,
                        tile_rows * stored_bytes(variant, ldw),
                    )
                outer_block(variant, scratch, k_block, row_count, panel, wide, count, c + 4 * (r * ldc + m), ldc)
