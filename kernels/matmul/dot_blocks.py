"""Products of a block of weight rows with few tokens, by dot products. Knows addresses and strides."""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import KernelVariant, activation_bytes, k_blocked, tuned
from fiddler.kernels.formats import stored_bytes
from fiddler.kernels.matmul.dot_tiles import dot_tile, dot_tokens

__all__ = ["multiply_dots"]

_prefetch_bytes, _pass_rows = tuned("dot_prefetch_bytes"), tuned("dot_pass_rows")
_compute_bound_tokens, _l1_activation_bytes = tuned("compute_bound_tokens"), tuned("l1_activation_bytes")
_k_block_elements = tuned("k_block_elements")


@njit(**OPTIONS)
def _k_block(k: int, max_elements: int) -> int:
    """Elements of a K-block, a multiple of 256, at most `max_elements`; equal blocks if these are not much shorter."""
    blocks = (k + max_elements - 1) // max_elements
    for equal_blocks in range(blocks, 2 * blocks):
        if k % (256 * equal_blocks) == 0:
            return k // equal_blocks
    return ((k + blocks - 1) // blocks + 255) // 256 * 256


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
        ldx * activation_bytes(variant),
        k,
        _prefetch_bytes(variant),
        k_blocked(variant) and tokens >= _compute_bound_tokens(variant),
    )
    if blocked:
        fitting = _l1_activation_bytes(variant) // (tokens * activation_bytes(variant)) // 256 * 256
        max_elements = max(256, min(_k_block_elements(variant), fitting))
        k_block, prefetch_distance = _k_block(k, max_elements), stored_bytes(variant, ldw)
    tiles = (tokens + dot_tokens(variant) - 1) // dot_tokens(variant)
    max_tokens = dot_tokens(variant) if blocked else (tokens + tiles - 1) // tiles
    pass_rows = rows if tiles == 1 else _pass_rows(variant)
    for begin in range(0, k, k_block):
        count = min(k_block, k - begin)
        if blocked and begin + k_block < k:
            prefetch_distance = stored_bytes(variant, k_block)
        elif blocked and next_offset != 0:
            prefetch_distance = next_offset - stored_bytes(variant, begin)
        xr = x + begin * activation_bytes(variant)
        for r in range(0, rows, pass_rows):
            wr, cr = w + stored_bytes(variant, r * ldw + begin), c + 4 * r * ldc
            tile_rows = min(pass_rows, rows - r)
            m, tile_distance = 0, prefetch_distance
            while m < tokens:
                xm, cm, tile_tokens = xr + m * token_bytes, cr + 4 * m, min(tokens - m, max_tokens)
                dot_tile(variant, tile_tokens, wr, ldw, tile_rows, xm, ldx, cm, ldc, count, tile_distance)
                m, tile_distance = m + tile_tokens, 0
