"""MXFP4 on a GPU: the decoder of `mxfp4.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, nibbles_at
from fiddler.kernels.formats.triton_words import byte_of_16, group_dot, int8_at, scale_at, unaligned_16

__all__ = ["mxfp4", "mxfp4_dot"]


@triton.jit
def _scale(exponent):
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def mxfp4(row, group, lane, mask):
    """32 weights in 17 bytes."""
    block = row + group * 17
    exponent, code = byte_at(block, mask), nibbles_at(block + 1, lane, mask)
    magnitude = (-0x379BCDF0 >> (code % 8 * 4)) & 15  # twice the number: 0, 1, 2, 3, 4, 6, 8, 12 in a word
    return _scale(exponent)[:, :, None] * tl.where(code < 8, magnitude, -magnitude).to(tl.float32)


@triton.jit
def mxfp4_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = unit * 17
    c0, c1, c2, c3 = unaligned_16(row, block + 1, EVEN)
    c0, d0 = byte_of_16(c0, 0x03020100, 0x0C080604, -0x02010100, -0x0B070504)
    c1, d1 = byte_of_16(c1, 0x03020100, 0x0C080604, -0x02010100, -0x0B070504)
    c2, d2 = byte_of_16(c2, 0x03020100, 0x0C080604, -0x02010100, -0x0B070504)
    c3, d3 = byte_of_16(c3, 0x03020100, 0x0C080604, -0x02010100, -0x0B070504)
    dots = group_dot(c0, c1, c2, c3, d0, d1, d2, d3, a, unit, planes)
    return _scale(int8_at(row + block) & 255) * (dots.to(tl.float32) * scale_at(a, unit, planes))
