"""Q5_0 and Q5_1 on a GPU: the decoders of `q5_0.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import bytes_at, half_at, nibbles_at
from fiddler.kernels.formats.triton_words import (
    activations_at,
    dot16,
    float16_at,
    half_bits_at,
    scale_at,
    sum16,
    unaligned_16,
)

__all__ = ["q5_0", "q5_0_dot", "q5_1", "q5_1_dot"]


@triton.jit
def _fifth_bit(address, lane, mask):
    return ((bytes_at(address, lane // 8, mask) >> (lane % 8)[None, None, :]) & 1) << 4


@triton.jit
def q5_0(row, group, lane, mask):
    """32 weights in 22 bytes."""
    block = row + group * 22
    code = nibbles_at(block + 6, lane, mask) | _fifth_bit(block + 2, lane, mask)
    return half_at(block, mask)[:, :, None] * (code - 16).to(tl.float32)


@triton.jit
def q5_1(row, group, lane, mask):
    """32 weights in 24 bytes."""
    block = row + group * 24
    code = nibbles_at(block + 8, lane, mask) | _fifth_bit(block + 4, lane, mask)
    scale, minimum = half_at(block, mask)[:, :, None], half_at(block + 2, mask)[:, :, None]
    return scale * code.to(tl.float32) + minimum


@triton.jit
def _fifth(code, bits):
    """Codes of 4 bits with the fifth bit of each, bits 0 to 3 of `bits`."""
    return code & 0x0F0F0F0F | (bits & 15) * 0x02040810 & 0x10101010


@triton.jit
def _dot(row, fifth, unit, a, planes, EVEN: tl.constexpr):
    """Of units of 32 codes, their fifth bits at bytes `fifth` of rows: as `q4_0_triton` has them without these."""
    b = half_bits_at(row + fifth) | half_bits_at(row + fifth + 2) << 16
    c0, c1, c2, c3 = unaligned_16(row, fifth + 4, EVEN)
    d0, d1, d2, d3 = (
        _fifth(c0 >> 4, b >> 16),
        _fifth(c1 >> 4, b >> 20),
        _fifth(c2 >> 4, b >> 24),
        _fifth(c3 >> 4, b >> 28),
    )
    c0, c1, c2, c3 = _fifth(c0, b), _fifth(c1, b >> 4), _fifth(c2, b >> 8), _fifth(c3, b >> 12)
    x0, x1, x2, x3 = activations_at(a, unit, 0, planes)
    dots = dot16(c0, c1, c2, c3, x0, x1, x2, x3, tl.zeros(c0.shape, tl.int32))
    sums = sum16(x0, x1, x2, x3, tl.zeros(unit.shape, tl.int32))
    x0, x1, x2, x3 = activations_at(a, unit, 1, planes)
    dots, sums = dot16(d0, d1, d2, d3, x0, x1, x2, x3, dots), sum16(x0, x1, x2, x3, sums)
    return dots, sums, scale_at(a, unit, planes)


@triton.jit
def q5_0_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = row + unit * 22
    dots, sums, scale = _dot(row, unit * 22 + 2, unit, a, planes, EVEN)
    return float16_at(block) * ((dots - 16 * sums).to(tl.float32) * scale)


@triton.jit
def q5_1_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = row + unit * 24
    dots, sums, scale = _dot(row, unit * 24 + 4, unit, a, planes, EVEN)
    return (float16_at(block) * dots.to(tl.float32) + float16_at(block + 2) * sums.to(tl.float32)) * scale
