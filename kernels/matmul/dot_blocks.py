"""Products of a block of weight rows with few tokens, by dot products. Knows addresses and strides."""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    k_blocked,
    row_bytes,
)
from fiddler.kernels.matmul.dot_tiles import COMPUTE_BOUND_TOKENS, dot_tile, dot_tokens

__all__ = ["multiply_dots"]
_PREFETCH_DISTANCE = 8192  # of a dot-product tile [bytes]
_ROWS_PER_PASS = 4  # weight rows that every tile of tokens reads before the next rows, with several tiles
_L1_ACTIVATIONS = 1 << 15  # activations that stay in the first-level cache while the weights stream past [bytes]
_MAX_K_BLOCK = 1024  # elements of a K-block, at most


@njit(**OPTIONS)
def _k_block(k: int, max_elements: int) -> int:
    """Elements of a K-block, a multiple of 256, at most `max_elements`; equal blocks if these are not much shorter."""
    blocks = (k + max_elements - 1) // max_elements
    for equal_blocks in range(blocks, 2 * blocks):
        if k % (256 * equal_blocks) == 0:
            return k // equal_blocks
    return ((k + blocks - 1) // blocks + 255) // 256 * 256


@njit(**OPTIONS)
def multiply_dots(
    variant: KernelVariant,
    w: int,
    ldw: int,
    rows: int,
    x: int,
    ldx: int,
    tokens: int,
    k: int,
    c: int,
    ldc: int,
    next_offset: int,
) -> None:
    """c += w . x, a few whole rows at a time: the order in which memory is read fastest.

    K-blocked, several tokens multiply one K-block of all rows after the other, so that this block of x stays in the
    first-level cache. A row's block then keeps the cores busy for longer than its load takes: they prefetch the next
    K-block of each row, or, in the last one, the first K-block of the rows that are read next.
    """
    token_bytes, k_block, prefetch_distance, blocked = (
        ldx * row_bytes(variant),
        k,
        _PREFETCH_DISTANCE,
        k_blocked(variant) and tokens >= COMPUTE_BOUND_TOKENS,
    )
    if blocked:
        max_elements = max(256, min(_MAX_K_BLOCK, _L1_ACTIVATIONS // (tokens * row_bytes(variant)) // 256 * 256))
        k_block, prefetch_distance = _k_block(k, max_elements), 2 * ldw
    tiles = (tokens + dot_tokens(variant) - 1) // dot_tokens(variant)
    max_tokens = dot_tokens(variant) if blocked else (tokens + tiles - 1) // tiles
    pass_rows = rows if tiles == 1 else _ROWS_PER_PASS
    for begin in range(0, k, k_block):
        count = min(k_block, k - begin)
        if blocked and begin + k_block < k:
            prefetch_distance = 2 * k_block
        elif blocked and next_offset != 0:
            prefetch_distance = next_offset - 2 * begin
        xr = x + begin * row_bytes(variant)
        for r in range(0, rows, pass_rows):
            wr, cr, tile_rows = w + 2 * (r * ldw + begin), c + 4 * r * ldc, min(pass_rows, rows - r)
            m, tile_distance = 0, prefetch_distance
            while m < tokens:
                xm, cm, tile_tokens = xr + m * token_bytes, cr + 4 * m, min(tokens - m, max_tokens)
                if tile_tokens == 1:
                    dot_tile(variant, 1, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif tile_tokens == 2:
                    dot_tile(variant, 2, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) >= 3 and tile_tokens == 3:
                    dot_tile(variant, 3, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) >= 4 and tile_tokens == 4:
                    dot_tile(variant, 4, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) >= 5 and tile_tokens == 5:
                    dot_tile(variant, 5, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) >= 6 and tile_tokens == 6:
                    dot_tile(variant, 6, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) >= 7 and tile_tokens == 7:
                    dot_tile(variant, 7, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                elif dot_tokens(variant) == 8:
                    dot_tile(variant, 8, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                m, tile_distance = m + tile_tokens, 0
