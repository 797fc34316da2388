"""The product of a block of weight rows with many tokens, by outer products."""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    outer_rows,
    outer_tokens,
    panel_tokens,
)
from fiddler.kernels.matmul.outer_tiles import outer_tile, widen_row

__all__ = ["OUTER_BLOCK", "multiply_outer", "multiply_outer_floats", "outer_block"]

# words along K that are taken at once, so that a panel's part stays in a cache while the weight rows go by
OUTER_BLOCK = 1024


@njit(**OPTIONS)
def outer_block(
    variant: KernelVariant, w: int, ldw: int, rows: int, x: int, wide: int, words: int, c: int, ldc: int
) -> None:
    """c += the product of weight rows with a panel of `wide` tokens, over `words` of each."""
    several = outer_rows(variant)
    whole = rows - rows % several
    m = 0
    while m < wide:
        at, sums = x + 4 * m, c + 4 * m
        if outer_tokens(variant) == 48 and wide - m == 48:
            for r in range(0, whole, several):
                outer_tile(variant, "several", 48, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 48
        elif outer_tokens(variant) == 48 and wide - m == 32:
            for r in range(0, whole, several):
                outer_tile(variant, "several", 32, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 32
        else:
            for r in range(0, whole, several):
                outer_tile(variant, "several", 16, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 16
    for r in range(whole, rows):  # few, if any: not worth code of their own for more tokens
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
    onward: int,
    scratch: int,
) -> None:
    """bf16 pairs, straight from the weights."""
    panel_width, words, stride = panel_tokens(variant), k // 2, ldw // 2
    for begin in range(0, words, OUTER_BLOCK):
        count = min(OUTER_BLOCK, words - begin)
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
    onward: int,
    scratch: int,
) -> None:
    """A few rows are widened to float32 at a time, and used from the first-level cache."""
    panel_width, several = panel_tokens(variant), outer_rows(variant)
    for begin in range(0, k, OUTER_BLOCK):
        count = min(OUTER_BLOCK, k - begin)
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel = x + 4 * (m * k + begin * wide)
            for r in range(0, rows, several):
                taken = min(several, rows - r)
                for i in range(taken):
                    widen_row(
                        variant,
                        w + 2 * ((r + i) * ldw + begin),
                        scratch + 4 * i * OUTER_BLOCK,
                        count,
                        2 * several * ldw,
                    )
                outer_block(variant, scratch, OUTER_BLOCK, taken, panel, wide, count, c + 4 * (r * ldc + m), ldc)
