"""Products of a block of weight rows with many tokens in AMX's tile registers. Knows addresses and strides."""

from __future__ import annotations

from fiddler.kernels.codegen.variant import (
    KernelVariant,
    panel_tokens,
)
from fiddler.kernels.matmul.amx_tiles import TILE_PAIRS, TILE_ROWS, configure_tiles, matrix_tile, release_tiles
from fiddler.kernels.matmul.outer_blocks import outer_block
from fiddler.kernels.matmul.stores import copy_words

__all__ = ["TILE_BLOCK_MANY", "multiply_tiles"]
_TILE_BLOCK_FEW, TILE_BLOCK_MANY = 2048, 512  # K-block [words]: few tokens are memory-bound, and favour long runs
_TILE_FEW = 64  # tokens, at most, that use _TILE_BLOCK_FEW
_PREFETCH = 1024  # prefetch distance along a weight row [bytes], some sixteen steps
# many tokens: each of the first panels prefetches 8 of every 32 rows of the next K-block
_PREFETCH_PANELS, _PREFETCH_ROWS = 4, 8


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
    many = padded > _TILE_FEW
    block = TILE_BLOCK_MANY if many else _TILE_BLOCK_FEW
    panel_width = panel_tokens(variant)
    tile_rows = rows - rows % TILE_ROWS
    configure_tiles(variant)
    for begin in range(0, words, block):
        count = min(block, words - begin)
        tile_k = count - count % TILE_PAIRS
        row = w + 4 * begin
        tiles, tile_stride = row, stride
        if many:
            tiles, tile_stride = scratch, TILE_BLOCK_MANY + 16
            for r in range(tile_rows):
                copy_words(tiles + 4 * r * tile_stride, row + 4 * r * stride, tile_k)
        last = begin + count == words
        next_block = w + next_offset if last else row + 4 * count  # of the rows that are read next, or of these rows
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel, sums = x + 4 * (m * words + begin * wide), c + 4 * m
            if tile_k > 0:
                prefetched_rows = m // panel_width * _PREFETCH_ROWS  # of every 32 rows, by earlier panels
                for r in range(0, tile_rows, TILE_ROWS):
                    wr, cr, next_w = (
                        tiles + 4 * r * tile_stride,
                        sums + 4 * r * ldc,
                        next_block + 4 * (r + prefetched_rows) * stride,
                    )
                    if wide == 16 and many:
                        matrix_tile(variant, 16, 0, wr, tile_stride, panel, wide, cr, ldc, tile_k, 0, 0)
                    elif wide == 16:
                        matrix_tile(
                            variant, 16, 32, wr, tile_stride, panel, wide, cr, ldc, tile_k, wr + _PREFETCH, stride
                        )
                    elif many and m < _PREFETCH_PANELS * panel_width and (next_offset != 0 or not last):
                        matrix_tile(
                            variant, 32, _PREFETCH_ROWS, wr, tile_stride, panel, wide, cr, ldc, tile_k, next_w, stride
                        )
                    elif m == 0 and not many:
                        matrix_tile(
                            variant, 32, 32, wr, tile_stride, panel, wide, cr, ldc, tile_k, wr + _PREFETCH, stride
                        )
                    else:
                        matrix_tile(variant, 32, 0, wr, tile_stride, panel, wide, cr, ldc, tile_k, 0, 0)
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
