"""Products of a block of weight rows with a group of tokens, built from tiles.

Knows addresses that its callers have validated: no bounds checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
from numba import njit, typeof, types
from numba.extending import overload

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.variant import (
    KernelVariant,
    amx,
    bf16_pairs,
    int8_packed,
    outer_rows,
    quantised,
)
from fiddler.kernels.formats import format_of
from fiddler.kernels.matmul.amx_blocks import k_words_many, multiply_tiles
from fiddler.kernels.matmul.decoded_blocks import decoded_words, multiply_blocks, multiply_decoded
from fiddler.kernels.matmul.dot_blocks import multiply_dots
from fiddler.kernels.matmul.int8_blocks import multiply_int8
from fiddler.kernels.matmul.int8_weights import int8_row_words
from fiddler.kernels.matmul.outer_blocks import multiply_outer, multiply_outer_floats, outer_k_words
from fiddler.kernels.matmul.stores import store_float

__all__ = ["block_product", "call_block_product", "scratch_words", "stored_as", "stored_kinds"]


@partial(kernel, parallel=False)
def _block_product(
    variant: KernelVariant,
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
    next_offset: int,
    scratch: int,
) -> None:
    """c[r * ldc + t] = w[r] . x[t] over k elements, for r < rows and t < tokens.

    `w`, `x`, `c`: addresses; `ldw`: elements from one weight row to the next; `ldx`: elements from one token to the
    next in the rows layout. In the packed layout c is written up to a multiple of 16 tokens. `next_offset`: bytes
    from `w` to the rows that are read next, 0 if unknown. `scratch`: address of `scratch_words(variant, rows)` words of
    the caller's, aligned to a cache line.
    """
    padded = (tokens + 15) // 16 * 16 if packed else tokens
    for r in range(rows):
        for m in range(padded):
            store_float(c, r * ldc + m, np.float32(0))
    if packed:
        _packed_product(variant, w, ldw, rows, x, padded, k, c, ldc, next_offset, scratch)
    else:
        _row_product(variant, w, ldw, rows, x, ldx, tokens, k, c, ldc, next_offset)


block_product = FunctionPointer(_block_product, None, types.boolean, *[types.intp] * 11)
call_block_product = block_product.call


@njit(**OPTIONS)
def scratch_words(variant: KernelVariant, rows: int) -> int:
    """Scratch of `block_product` for blocks of weights that it copies or widens [words of 4 bytes]."""
    if int8_packed(variant):
        unpacked: int = rows * int8_row_words(variant)
        return unpacked
    if quantised(variant):
        decoded: int = rows * decoded_words(variant)
        return decoded
    if amx(variant):
        packed: int = k_words_many(variant) + 16
        return rows * packed
    words: int = 0 if bf16_pairs(variant) else outer_rows(variant) * outer_k_words(variant)
    return words


def _row_product(
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
    """c += w . x for tokens in the rows layout, by the variant's function: of plain or of quantised weights."""
    raise NotImplementedError("called from compiled code only")


@overload(_row_product, jit_options=OPTIONS)
def _row_product_of(
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
) -> Callable[..., None]:
    kind: KernelVariant = cast(Any, variant).variant
    return multiply_blocks if kind.quantised else multiply_dots


def _packed_product(
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
    """c += w . x for tokens in the packed layout, by the variant's function: AMX, bf16 pairs or float32."""
    raise NotImplementedError("called from compiled code only")


@overload(_packed_product, jit_options=OPTIONS)
def _packed_product_of(
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
) -> Callable[..., None]:
    # selected before compilation: compiling the other variants' unused code took a third of the time
    kind: KernelVariant = cast(Any, variant).variant  # the arguments are Numba's types
    if kind.int8_packed:
        return multiply_int8
    if kind.quantised:
        return multiply_decoded
    if kind.amx:
        return multiply_tiles
    return multiply_outer if kind.bf16_pairs else multiply_outer_floats


@lru_cache(maxsize=256)
def stored_as(variant: KernelVariant, columns: int) -> tuple[int, int]:
    """How a matrix with rows of so many weights is stored, and multiplied: bytes of a row, and its kernel's address."""
    return format_of(variant).row_bytes(columns), block_product.address(typeof(variant))


@lru_cache(maxsize=256)
def stored_kinds(variants: tuple[KernelVariant, ...], columns: tuple[int, ...]) -> np.ndarray:
    """`stored_as` of several matrices, int64 [matrices, 2]."""
    return np.array([stored_as(*each) for each in zip(variants, columns, strict=True)], np.int64).reshape(-1, 2)
