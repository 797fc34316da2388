"""Products of a block of weight rows with many tokens in AMX's tile registers. Knows addresses and strides."""

from __future__ import annotations

from fiddler.kernels.codegen.variant import (
    KernelVariant,
    panel_tokens,
    tuned,
)
from fiddler.kernels.matmul.amx_tiles import TILE_PAIRS, TILE_ROWS, configure_tiles, matrix_tile, release_tiles
from fiddler.kernels.matmul.outer_blocks import outer_block
from fiddler.kernels.matmul.stores import copy_words

__all__ = ["k_words_many", "multiply_tiles"]
k_words_many = tuned("amx_k_words_many")
"""K-block of many tokens [words]."""

_k_words_few, _few_tokens = tuned("amx_k_words_few"), tuned("amx_few_tokens")
_prefetch_bytes, _prefetch_panels = tuned("amx_prefetch_bytes"), tuned("amx_prefetch_panels")
_prefetch_rows = tuned("amx_prefetch_rows")


def multiply_tiles(
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
    """c += w . x in tile registers; outer products compute the remainders: rows beyond a multiple of 32, the end of K.

    Many tokens read a block of weights repeatedly: from a scratch copy with adjacent rows, because rows a large power
    of two apart compete for the same cache sets.
    """
    words, stride = k // 2, ldw // 2
    many = padded > _few_tokens(variant)
    block = k_words_many(variant) if many else _k_words_few(variant)
    panel_width = panel_tokens(variant)
    tile_rows = rows - rows % TILE_ROWS
    configure_tiles(variant)
    for begin in range(0, words, block):
        count = min(block, words - begin)
        tile_k = count - count % TILE_PAIRS
        row = w + 4 * begin
        tiles, tile_stride = row, stride
        if many:
            tiles, tile_stride = scratch, k_words_many(variant) + 16
            for r in range(tile_rows):
                copy_words(tiles + 4 * r * tile_stride, row + 4 * r * stride, tile_k)
        last = begin + count == words
        next_block = w + next_offset if last else row + 4 * count  # of the rows that are read next, or of these rows
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel, sums = x + 4 * (m * words + begin * wide), c + 4 * m
            if tile_k > 0:
                prefetched_rows = m // panel_width * _prefetch_rows(variant)  # of every 32 rows, by earlier panels
                for r in range(0, tile_rows, TILE_ROWS):
                    wr, cr, next_w = (
                        tiles + 4 * r * tile_stride,
                        sums + 4 * r * ldc,
                        next_block + 4 * (r + prefetched_rows) * stride,
                    )
                    wr_next = wr + _prefetch_bytes(variant)
                    if wide == 16 and many:
                        matrix_tile(variant, 16, "none", wr, tile_stride, panel, wide, cr, ldc, tile_k, 0, 0)
                    elif wide == 16:
                        matrix_tile(
                            variant,
                            16,
                            "all",
                            wr,
                            tile_stride,
                            panel,
                            wide,
                            cr,
                            ldc,
                            tile_k,
                            wr_next,
                            stride,
                        )
                    elif many and m < _prefetch_panels(variant) * panel_width and (next_offset != 0 or not last):
                        matrix_tile(variant, 32, "part", wr, tile_stride, panel, wide, cr, ldc, tile_k, next_w, stride)
                    elif m == 0 and not many:
                        matrix_tile(
                            variant,
                            32,
                            "all",
                            wr,
                            tile_stride,
                            panel,
                            wide,
                            cr,
                            ldc,
                            tile_k,
                            wr_next,
                            stride,
                        )
                    else:
                        matrix_tile(variant, 32, "none", wr, tile_stride, panel, wide, cr, ldc, tile_k, 0, 0)
            for remainder in range(2):  # one call site for both: it takes seconds to compile
                skip, top, row_count = (tile_k, 0, tile_rows) if remainder == 0 else (0, tile_rows, rows - tile_rows)
                outer_block(
                    variant,
                    row + 4 * (top * stride + skip),
                    stride,
                    row_count,
                    panel + 4 * skip * wide,
                    wide,
                    count - skip,
                    sums + 4 * top * ldc,
                    ldc,
                )
    release_tiles(variant)
