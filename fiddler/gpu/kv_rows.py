"""Rows of the KV cache in Triton: what `row_layout.RowLayout` and `PlanarRows` store, read and written in registers.

A row is one position's keys or values of one head; a head has P rows in a block. The type of `memory` says how they are
stored: float16 or float32 one row after the other; uint8 the codes of Q8_0 of all P rows, then their float16 scales.
Knows addresses; no tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["PRODUCTS", "read_rows", "write_pairs"]

PRODUCTS = {torch.float16: tl.float16, torch.float32: tl.float32}
"""Triton's name of the type in which attention multiplies."""
_BYTES = tl.constexpr(34)  # bytes of 32 numbers in Q8_0
_NAN = tl.constexpr(0x7E00)  # as a CPU rounds it to float16


@triton.jit
def read_rows(
    memory, block, head, row, there, first, d, width, dim, P: tl.constexpr, W: tl.constexpr, WHOLE: tl.constexpr
):
    """Elements first + d [D] of rows [N] of a head, as W [N, D]; 0 but where the row is `there` [N] and d < width.

    block [N]: where blocks begin, in elements of `memory`. dim: of a row. WHOLE: `first`, D and `width` are multiples
    of 32; then a scale is loaded once for its 32 codes.
    """
    mask = there[:, None] & (d < width)[None, :]
    if memory.dtype.element_ty != tl.uint8:
        offset = (block + (head * P + row) * dim)[:, None]
        values = tl.load(memory + offset + first + d[None, :], mask=mask, other=0.0).to(W)
    else:
        head_bytes = block + head * (dim // 32 * (_BYTES * P))
        codes = tl.load(memory + (head_bytes + row * dim)[:, None] + first + d[None, :], mask=mask, other=0)
        scales = (memory + (head_bytes + P * dim)).to(tl.pointer_type(tl.float16), bitcast=True) + row * (dim // 32)
        if WHOLE:
            b = tl.arange(0, d.shape[0] // 32)
            of_blocks = there[:, None] & (32 * b < width)[None, :]
            scale = tl.load(scales[:, None] + first // 32 + b[None, :], mask=of_blocks, other=0.0)
            scale = tl.broadcast_to(scale[:, :, None], [there.shape[0], d.shape[0] // 32, 32])
            scale = tl.reshape(scale, [there.shape[0], d.shape[0]])
        else:
            scale = tl.load(scales[:, None] + ((first + d) // 32)[None, :], mask=mask, other=0.0)
        values = codes.to(tl.int8, bitcast=True).to(W) * scale.to(W)
    return values


@triton.jit
def write_pairs(memory, block, head, row, x, y, i, inside, dim, P: tl.constexpr):
    """Store a row whose elements are x at 2 i and y at 2 i + 1, float32 [I], where `inside` [I].

    Q8_0 as `q8_0_rows.encoded` makes it, in every bit; products must not be fused with sums then.
    """
    if memory.dtype.element_ty != tl.uint8:
        offset = block + (head * P + row) * dim + 2 * i
        tl.store(memory + offset, x.to(memory.dtype.element_ty), mask=inside)
        tl.store(memory + offset + 1, y.to(memory.dtype.element_ty), mask=inside)
    else:
        at = memory + block + head * (dim // 32 * (_BYTES * P))
        B: tl.constexpr = i.shape[0] // 16
        largest = tl.max(tl.reshape(tl.maximum(tl.abs(x), tl.abs(y)), [B, 16]), 1)
        no_number = tl.max(tl.reshape(((x != x) | (y != y)).to(tl.int32), [B, 16]), 1) > 0  # which a maximum may lack
        scale = tl.div_rn(largest, tl.full([B], 127.0, tl.float32))
        inverse = tl.div_rn(tl.full([B], 1.0, tl.float32), scale)
        inverse = tl.where(no_number | (scale == 0.0), 0.0, inverse)
        inverse = tl.reshape(tl.broadcast_to(inverse[:, None], [B, 16]), [16 * B])
        codes = at + row * dim + 2 * i
        tl.store(codes, _code(x * inverse), mask=inside)
        tl.store(codes + 1, _code(y * inverse), mask=inside)
        bits = tl.where(no_number, _NAN, scale.to(tl.float16).to(tl.int16, bitcast=True))
        scales = (at + P * dim).to(tl.pointer_type(tl.int16), bitcast=True) + row * (dim // 32)
        b = tl.arange(0, B)
        tl.store(scales + b, bits.to(tl.int16), mask=b < dim // 32)


@triton.jit
def _code(scaled):
    """The nearest int8, half away from zero, as its bits; 0 for what is no number."""
    magnitude = tl.floor(tl.abs(scaled))
    magnitude += tl.floor(2 * (tl.abs(scaled) - magnitude))
    magnitude = tl.where(magnitude == magnitude, tl.minimum(magnitude, 127.0), 0.0).to(tl.int32)
    return tl.where(scaled < 0, -magnitude, magnitude).to(tl.int8).to(tl.uint8, bitcast=True)
