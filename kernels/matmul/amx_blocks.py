"""The product of a block of weight rows with many tokens in AMX's tile registers."""

from __future__ import annotations

from fiddler.kernels.codegen.variant import (
    KernelVariant,
    panel_tokens,
)
from fiddler.kernels.matmul.amx_tiles import TILE_PAIRS, TILE_ROWS, configure_tiles, matrix_tile, release_tiles
from fiddler.kernels.matmul.outer_blocks import outer_block
from fiddler.kernels.matmul.stores import copy_words

__all__ = ["TILE_BLOCK_MANY", "multiply_tiles"]
_TILE_BLOCK_FEW, TILE_BLOCK_MANY = 2048, 512  # for AMX: few tokens wait for memory, and want long runs of weights
_TILE_FEW = 64  # tokens
_TILE_AHEAD = 1024  # bytes along a weight row, some sixteen steps
_TILE_PANELS, _TILE_FETCHED = 4, 8  # the first panels of many tokens, each with so many of every 32 rows that come next


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
    onward: int,
    scratch: int,
) -> None:
    """Tile registers, and outer products for what they leave: rows beyond a multiple of 32, the end of K.

    Many tokens read a block of weights again and again: from a scratch copy in the cache, whose rows lie close, since
    rows a large power of two apart share their places in it.
    """
    words, stride = k // 2, ldw // 2
    many = padded > _TILE_FEW
    block = TILE_BLOCK_MANY if many else _TILE_BLOCK_FEW
    panel_width = panel_tokens(variant)
    whole = rows - rows % TILE_ROWS
    configure_tiles(variant)
    for begin in range(0, words, block):
        count = min(block, words - begin)
        done = count - count % TILE_PAIRS
        row = w + 4 * begin
        tiles, tile_stride = row, stride
        if many:
            tiles, tile_stride = scratch, TILE_BLOCK_MANY + 16
            for r in range(whole):
                copy_words(tiles + 4 * r * tile_stride, row + 4 * r * stride, done)
        last = begin + count == words
        following = w + onward if last else row + 4 * count  # the first block of what comes next, or the next one here
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel, sums = x + 4 * (m * words + begin * wide), c + 4 * m
            if done > 0:
                fetched = m // panel_width * _TILE_FETCHED  # of every 32 rows, by the panels before
                for r in range(0, whole, TILE_ROWS):
                    wr, cr, ahead = (
                        tiles + 4 * r * tile_stride,
                        sums + 4 * r * ldc,
                        following + 4 * (r + fetched) * stride,
                    )
                    if wide == 16 and many:
                        matrix_tile(variant, 16, 0, wr, tile_stride, panel, wide, cr, ldc, done, 0, 0)
                    elif wide == 16:
                        matrix_tile(
                            variant, 16, 32, wr, tile_stride, panel, wide, cr, ldc, done, wr + _TILE_AHEAD, stride
                        )
                    elif many and m < _TILE_PANELS * panel_width and (onward != 0 or not last):
                        matrix_tile(
                            variant, 32, _TILE_FETCHED, wr, tile_stride, panel, wide, cr, ldc, done, ahead, stride
                        )
                    elif m == 0 and not many:
                        matrix_tile(
                            variant, 32, 32, wr, tile_stride, panel, wide, cr, ldc, done, wr + _TILE_AHEAD, stride
                        )
                    else:
                        matrix_tile(variant, 32, 0, wr, tile_stride, panel, wide, cr, ldc, done, 0, 0)
            for part in range(2):  # of one call, which takes seconds to compile
                skip, top, left = (done, 0, whole) if part == 0 else (0, whole, rows - whole)
                outer_block(
                    variant,
                    row + 4 * (top * stride + skip),
                    stride,
                    left,
                    panel + 4 * skip * wide,
                    wide,
                    count - skip,
                    sums + 4 * top * ldc,
                    ldc,
                )
    release_tiles(variant)
