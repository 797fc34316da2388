"""Products of a block of quantised weight rows with a group of tokens. Knows addresses and strides.

Few tokens: dot products straight from the weights. Many: some hundred weights of each row are decoded once, into a
scratch that stays in a cache, and multiplied with all tokens, by the tiles that multiply 16-bit or float32 weights.
"""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import KernelVariant, activation_bytes, amx, bf16_pairs, panel_tokens, tuned
from fiddler.kernels.formats import stored_bytes
from fiddler.kernels.matmul.amx_tiles import TILE_ROWS, configure_tiles, matrix_tile, release_tiles
from fiddler.kernels.matmul.block_tiles import block_tile, block_tokens
from fiddler.kernels.matmul.decoded_rows import decode_row
from fiddler.kernels.matmul.outer_blocks import outer_block

__all__ = ["decoded_words", "multiply_blocks", "multiply_decoded"]

_prefetch_bytes, _pass_rows, _decoded_k = tuned("dot_prefetch_bytes"), tuned("dot_pass_rows"), tuned("decoded_k")


@njit(**OPTIONS)
def decoded_words(variant: KernelVariant) -> int:
    """Words of 4 bytes from one decoded row to the next: a cache line more, so that rows spread over the cache."""
    elements: int = _decoded_k(variant)
    return (elements // 2 if bf16_pairs(variant) else elements) + 16


def multiply_blocks(
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
    """c += w . x for few tokens: a row after the other, as they lie in memory."""
    row_bytes, token_bytes = stored_bytes(variant, ldw), ldx * activation_bytes(variant)
    tiles = (tokens + block_tokens(variant) - 1) // block_tokens(variant)
    max_tokens = (tokens + tiles - 1) // tiles
    pass_rows = rows if tiles == 1 else _pass_rows(variant)
    for r in range(0, rows, pass_rows):
        m, distance = 0, _prefetch_bytes(variant)
        while m < tokens:
            count = min(tokens - m, max_tokens)
            block_tile(
                *(variant, count, w + r * row_bytes, row_bytes, min(pass_rows, rows - r), x + m * token_bytes, ldx),
                *(ldw, c + 4 * (r * ldc + m), ldc, k, distance),
            )
            m += count


def multiply_decoded(
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
    """c += w . x for many packed tokens: decodes a K-block of all rows, then multiplies it with every panel."""
    panel_width, k_block, stride = panel_tokens(variant), _decoded_k(variant), decoded_words(variant)
    per_word = 2 if bf16_pairs(variant) else 1  # weights of a word
    row_bytes, words = stored_bytes(variant, ldw), k // per_word
    tile_rows = rows - rows % TILE_ROWS if amx(variant) else 0
    if amx(variant):
        configure_tiles(variant)
    for begin in range(0, k, k_block):
        count = min(k_block, k - begin)
        at, count_words = w + stored_bytes(variant, begin), count // per_word
        for r in range(rows):
            decode_row(variant, at + r * row_bytes, scratch + 4 * r * stride, count, stored_bytes(variant, k_block))
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel, sums = x + 4 * (m * words + begin // per_word * wide), c + 4 * m
            for r in range(0, tile_rows, TILE_ROWS):
                wr, cr = scratch + 4 * r * stride, sums + 4 * r * ldc
                if wide == 16:
                    matrix_tile(variant, 16, "none", wr, stride, panel, wide, cr, ldc, count_words, 0, 0)
                else:
                    matrix_tile(variant, 32, "none", wr, stride, panel, wide, cr, ldc, count_words, 0, 0)
            outer_block(
                *(variant, scratch + 4 * tile_rows * stride, stride, rows - tile_rows, panel, wide, count_words),
                *(sums + 4 * tile_rows * ldc, ldc),
            )
    if amx(variant):
        release_tiles(variant)
