"""The product of a block of weight rows with a group of tokens, built from tiles.

Works on addresses that its callers have validated: no bounds checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
from numba import njit, types
from numba.extending import overload

from fiddler.kernels.codegen.function_pointer import Called
from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.variant import (
    Product,
    in_pairs,
    in_parts,
    in_tiles,
    outer_rows,
    outer_tokens,
    panel_tokens,
    row_bytes,
)
from fiddler.kernels.matmul.amx_tiles import TILE_PAIRS, TILE_ROWS, configure_tiles, matrix_tile, release_tiles
from fiddler.kernels.matmul.dot_tiles import SEVERAL, dot_tile, dot_tokens, outer_tile, widen_row
from fiddler.kernels.matmul.stores import copy_words, store_float

__all__ = ["block_product", "call_block_product", "scratch_words"]

# words along K that are taken at once, so that a panel's part stays in a cache while the weight rows go by
_BLOCK = 1024
_AHEAD = 8192  # bytes of weights that a dot-product tile reads between asking for a cache line and using it
_ROWS_OF_MANY = 4  # weight rows that tokens of more than one tile take by turns
_NEAR = 1 << 15  # bytes of activations that stay in the first-level cache while the weights go by
_PART = 1024  # elements along K that are a part, at most
_TILE_BLOCK_FEW, _TILE_BLOCK_MANY = 2048, 512  # for AMX: few tokens wait for memory, and want long runs of weights
_TILE_FEW = 64  # tokens
_TILE_AHEAD = 1024  # bytes along a weight row, some sixteen steps
_TILE_PANELS, _TILE_FETCHED = 4, 8  # the first panels of many tokens, each with so many of every 32 rows that come next


@partial(kernel, parallel=False)
def _block_product(
    product: Product,
    packed: bool,
    w: int,
    ldw: int,
    rows: int,
    x: int,
    ldx: int,
    tokens: int,
    k: int,
    c: int,
    ldc: int,
    onward: int,
    scratch: int,
) -> None:
    """c[r * ldc + t] = w[r] . x[t] over k elements, for r < rows and t < tokens.

    `w`, `x`, `c`: addresses; `ldw`: elements from one weight row to the next; `ldx`: elements from one token to the
    next in the rows layout. In the packed layout c is written up to a multiple of 16 tokens. `onward`: bytes from `w`
    to the rows that are read next, 0 where nobody knows. `scratch`: address of `scratch_words(product, rows)` words of
    the caller's, at a cache line.
    """
    padded = (tokens + 15) // 16 * 16 if packed else tokens
    for r in range(rows):
        for m in range(padded):
            store_float(c, r * ldc + m, np.float32(0))
    if packed:
        _packed_product(product, w, ldw, rows, x, padded, k, c, ldc, onward, scratch)
    else:
        _dots(product, w, ldw, rows, x, ldx, tokens, k, c, ldc, onward)


block_product = Called(_block_product, None, types.boolean, *[types.intp] * 11)
call_block_product = block_product.call


@njit(**OPTIONS)
def scratch_words(product: Product, rows: int) -> int:
    """Words of 4 bytes that `block_product` uses for blocks of weights that it copies or widens."""
    if in_tiles(product):
        return rows * (_TILE_BLOCK_MANY + 16)
    words: int = 0 if in_pairs(product) else outer_rows(product) * _BLOCK
    return words


@njit(**OPTIONS)
def _part(k: int, most: int) -> int:
    """At most so many elements of k, a multiple of 256: equal parts, where there are any not much smaller."""
    parts = (k + most - 1) // most
    for equal in range(parts, 2 * parts):
        if k % (256 * equal) == 0:
            return k // equal
    return ((k + parts - 1) // parts + 255) // 256 * 256


@njit(**OPTIONS)
def _dots(
    product: Product, w: int, ldw: int, rows: int, x: int, ldx: int, tokens: int, k: int, c: int, ldc: int, onward: int
) -> None:
    """A few rows at once, from their beginning to their end: the order in which memory is read fastest.

    In parts, several tokens go a part of all rows after the other instead, so that as much of x stays in the
    first-level cache. The cores are busy for longer than a row's part is on its way then; so the next part of each row
    is asked for, or, with the last one, the first part of the rows that are read next.
    """
    token, part, ahead, parted = ldx * row_bytes(product), k, _AHEAD, in_parts(product) and tokens >= SEVERAL
    if parted:
        fits = max(256, min(_PART, _NEAR // (tokens * row_bytes(product)) // 256 * 256))
        part, ahead = _part(k, fits), 2 * ldw
    chunks = (tokens + dot_tokens(product) - 1) // dot_tokens(product)
    most = dot_tokens(product) if parted else (tokens + chunks - 1) // chunks
    taken = rows if chunks == 1 else _ROWS_OF_MANY
    for begin in range(0, k, part):
        count = min(part, k - begin)
        if parted and begin + part < k:
            ahead = 2 * part
        elif parted and onward != 0:
            ahead = onward - 2 * begin
        xr = x + begin * row_bytes(product)
        for r in range(0, rows, taken):
            wr, cr, these = w + 2 * (r * ldw + begin), c + 4 * r * ldc, min(taken, rows - r)
            m, first = 0, ahead
            while m < tokens:
                xm, cm, left = xr + m * token, cr + 4 * m, min(tokens - m, most)
                if left == 1:
                    dot_tile(product, 1, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif left == 2:
                    dot_tile(product, 2, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) >= 3 and left == 3:
                    dot_tile(product, 3, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) >= 4 and left == 4:
                    dot_tile(product, 4, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) >= 5 and left == 5:
                    dot_tile(product, 5, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) >= 6 and left == 6:
                    dot_tile(product, 6, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) >= 7 and left == 7:
                    dot_tile(product, 7, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(product) == 8:
                    dot_tile(product, 8, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                m, first = m + left, 0


@njit(**OPTIONS)
def _outer_block(
    product: Product, w: int, ldw: int, rows: int, x: int, wide: int, words: int, c: int, ldc: int
) -> None:
    """c += the product of weight rows with a panel of `wide` tokens, over `words` of each."""
    several = outer_rows(product)
    whole = rows - rows % several
    m = 0
    while m < wide:
        at, sums = x + 4 * m, c + 4 * m
        if outer_tokens(product) == 48 and wide - m == 48:
            for r in range(0, whole, several):
                outer_tile(product, "several", 48, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 48
        elif outer_tokens(product) == 48 and wide - m == 32:
            for r in range(0, whole, several):
                outer_tile(product, "several", 32, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 32
        else:
            for r in range(0, whole, several):
                outer_tile(product, "several", 16, w + 4 * r * ldw, ldw, at, wide, sums + 4 * r * ldc, ldc, words)
            m += 16
    for r in range(whole, rows):  # few, if any: not worth code of their own for more tokens
        for m in range(0, wide, 16):
            outer_tile(product, "one", 16, w + 4 * r * ldw, ldw, x + 4 * m, wide, c + 4 * (r * ldc + m), ldc, words)


def _outers(
    product: Product,
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
    panel_width, words, stride = panel_tokens(product), k // 2, ldw // 2
    for begin in range(0, words, _BLOCK):
        count = min(_BLOCK, words - begin)
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            _outer_block(
                product, w + 4 * begin, stride, rows, x + 4 * (m * words + begin * wide), wide, count, c + 4 * m, ldc
            )


def _outers_of_floats(
    product: Product,
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
    panel_width, several = panel_tokens(product), outer_rows(product)
    for begin in range(0, k, _BLOCK):
        count = min(_BLOCK, k - begin)
        for m in range(0, padded, panel_width):
            wide = min(panel_width, padded - m)
            panel = x + 4 * (m * k + begin * wide)
            for r in range(0, rows, several):
                taken = min(several, rows - r)
                for i in range(taken):
                    widen_row(
                        product, w + 2 * ((r + i) * ldw + begin), scratch + 4 * i * _BLOCK, count, 2 * several * ldw
                    )
                _outer_block(product, scratch, _BLOCK, taken, panel, wide, count, c + 4 * (r * ldc + m), ldc)


def _tiles(
    product: Product,
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
    block = _TILE_BLOCK_MANY if many else _TILE_BLOCK_FEW
    panel_width = panel_tokens(product)
    whole = rows - rows % TILE_ROWS
    configure_tiles(product)
    for begin in range(0, words, block):
        count = min(block, words - begin)
        done = count - count % TILE_PAIRS
        row = w + 4 * begin
        tiles, tile_stride = row, stride
        if many:
            tiles, tile_stride = scratch, _TILE_BLOCK_MANY + 16
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
                        matrix_tile(product, 16, 0, wr, tile_stride, panel, wide, cr, ldc, done, 0, 0)
                    elif wide == 16:
                        matrix_tile(
                            product, 16, 32, wr, tile_stride, panel, wide, cr, ldc, done, wr + _TILE_AHEAD, stride
                        )
                    elif many and m < _TILE_PANELS * panel_width and (onward != 0 or not last):
                        matrix_tile(
                            product, 32, _TILE_FETCHED, wr, tile_stride, panel, wide, cr, ldc, done, ahead, stride
                        )
                    elif m == 0 and not many:
                        matrix_tile(
                            product, 32, 32, wr, tile_stride, panel, wide, cr, ldc, done, wr + _TILE_AHEAD, stride
                        )
                    else:
                        matrix_tile(product, 32, 0, wr, tile_stride, panel, wide, cr, ldc, done, 0, 0)
            for part in range(2):  # of one call, which takes seconds to compile
                skip, top, left = (done, 0, whole) if part == 0 else (0, whole, rows - whole)
                _outer_block(
                    product,
                    row + 4 * (top * stride + skip),
                    stride,
                    left,
                    panel + 4 * skip * wide,
                    wide,
                    count - skip,
                    sums + 4 * top * ldc,
                    ldc,
                )
    release_tiles(product)


def _packed_product(
    product: Product,
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
    """c += the product, for tokens in the packed layout: whichever of these functions is this product's."""
    raise NotImplementedError("called from compiled code only")


@overload(_packed_product, jit_options=OPTIONS)
def _packed_product_of(
    product: Product,
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
) -> Callable[..., None]:
    # chosen before anything is compiled: code for the other kinds, never run, took a third of the time
    kind: Product = cast(Any, product).product  # the arguments are Numba's types
    if kind.in_tiles:
        return _tiles
    return _outers if kind.in_pairs else _outers_of_floats
