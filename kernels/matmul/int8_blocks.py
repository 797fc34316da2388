"""Products of a block of quantised weight rows with many tokens in int8. Knows addresses and strides.

Some hundred weights of each row become int8 once, in a scratch that stays in a cache, and are multiplied with all
tokens.
"""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import KernelVariant, panel_tokens, tuned
from fiddler.kernels.formats import stored_bytes
from fiddler.kernels.matmul.int8_activations import GROUP_WORDS
from fiddler.kernels.matmul.int8_tiles import int8_tile, tile_rows
from fiddler.kernels.matmul.int8_weights import int8_row_words, unpack_row

__all__ = ["multiply_int8"]

_decoded_k = tuned("decoded_k")
_ROWS_16, _ROWS_32, _ROWS_48 = (tile_rows(tokens) for tokens in (16, 32, 48))


@njit(**OPTIONS)
def _int8_block(variant: KernelVariant, w: int, rows: int, x: int, wide: int, groups: int, c: int, ldc: int) -> None:
    """c += w . x for weight rows and a panel of `wide` tokens, over `groups` groups of 32 along K."""
    stride, full_rows = 4 * int8_row_words(variant), rows
    if wide == 48:
        full_rows -= rows % _ROWS_48
        for r in range(0, full_rows, _ROWS_48):
            int8_tile(variant, "several", 48, w + r * stride, x, wide, c + 4 * r * ldc, ldc, groups)
    elif wide == 32:
        full_rows -= rows % _ROWS_32
        for r in range(0, full_rows, _ROWS_32):
            int8_tile(variant, "several", 32, w + r * stride, x, wide, c + 4 * r * ldc, ldc, groups)
    else:
        full_rows -= rows % _ROWS_16
        for r in range(0, full_rows, _ROWS_16):
            int8_tile(variant, "several", 16, w + r * stride, x, wide, c + 4 * r * ldc, ldc, groups)
    for r in range(full_rows, rows):  # few, if any: not worth compiling tiles for more tokens
        for m in range(0, wide, 16):
            int8_tile(variant, "one", 16, w + r * stride, x + 4 * m, wide, c + 4 * (r * ldc + m), ldc, groups)


def multiply_int8(
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
    """c += w . x for many packed tokens: unpacks a K-block of all rows, then multiplies it with every panel."""
    panel_width, k_block, stride = panel_tokens(variant), _decoded_k(variant), 4 * int8_row_words(variant)
    row_bytes, words = stored_bytes(variant, ldw), k // 32 * GROUP_WORDS
    for begin in range(0, k, k_block):
        count, at = min(k_block, k - begin), w + stored_bytes(variant, begin)
        for r in range(rows):
            unpack_row(variant, at + r * row_bytes, scratch + r * stride, count, stored_bytes(variant, k_block))
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel = x + 4 * (m * words + begin // 32 * GROUP_WORDS * wide)
            _int8_block(variant, scratch, rows, panel, wide, count // 32, c + 4 * m, ldc)
