"""The product of a block of weight rows with few tokens, by dot products."""

from __future__ import annotations

from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    k_blocked,
    row_bytes,
)
from fiddler.kernels.matmul.dot_tiles import SEVERAL, dot_tile, dot_tokens

__all__ = ["multiply_dots"]
_AHEAD = 8192  # bytes of weights that a dot-product tile reads between asking for a cache line and using it
_ROWS_OF_MANY = 4  # weight rows that tokens of more than one tile take by turns
_NEAR = 1 << 15  # bytes of activations that stay in the first-level cache while the weights go by
_PART = 1024  # elements along K that are a part, at most


@njit(**OPTIONS)
def _part(k: int, most: int) -> int:
    """At most so many elements of k, a multiple of 256: equal parts, where there are any not much smaller."""
    parts = (k + most - 1) // most
    for equal in range(parts, 2 * parts):
        if k % (256 * equal) == 0:
            return k // equal
    return ((k + parts - 1) // parts + 255) // 256 * 256


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
    onward: int,
) -> None:
    """A few rows at once, from their beginning to their end: the order in which memory is read fastest.

    In parts, several tokens go a part of all rows after the other instead, so that as much of x stays in the
    first-level cache. The cores are busy for longer than a row's part is on its way then; so the next part of each row
    is asked for, or, with the last one, the first part of the rows that are read next.
    """
    token, part, ahead, blocked = ldx * row_bytes(variant), k, _AHEAD, k_blocked(variant) and tokens >= SEVERAL
    if blocked:
        fits = max(256, min(_PART, _NEAR // (tokens * row_bytes(variant)) // 256 * 256))
        part, ahead = _part(k, fits), 2 * ldw
    chunks = (tokens + dot_tokens(variant) - 1) // dot_tokens(variant)
    most = dot_tokens(variant) if blocked else (tokens + chunks - 1) // chunks
    taken = rows if chunks == 1 else _ROWS_OF_MANY
    for begin in range(0, k, part):
        count = min(part, k - begin)
        if blocked and begin + part < k:
            ahead = 2 * part
        elif blocked and onward != 0:
            ahead = onward - 2 * begin
        xr = x + begin * row_bytes(variant)
        for r in range(0, rows, taken):
            wr, cr, these = w + 2 * (r * ldw + begin), c + 4 * r * ldc, min(taken, rows - r)
            m, first = 0, ahead
            while m < tokens:
                xm, cm, left = xr + m * token, cr + 4 * m, min(tokens - m, most)
                if left == 1:
                    dot_tile(variant, 1, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif left == 2:
                    dot_tile(variant, 2, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) >= 3 and left == 3:
                    dot_tile(variant, 3, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) >= 4 and left == 4:
                    dot_tile(variant, 4, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) >= 5 and left == 5:
                    dot_tile(variant, 5, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) >= 6 and left == 6:
                    dot_tile(variant, 6, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) >= 7 and left == 7:
                    dot_tile(variant, 7, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                elif dot_tokens(variant) == 8:
                    dot_tile(variant, 8, wr, ldw, these, xm, ldx, cm, ldc, count, first)
                m, first = m + left, 0
