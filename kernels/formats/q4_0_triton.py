"""Q4_0 and Q4_1 on a GPU: the decoders of `q4_0.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import half_at, nibbles_at
from fiddler.kernels.formats.triton_words import activations_at, float16_at, nibble_dots, scale_at, sum16, unaligned_16

__all__ = ["q4_0", "q4_0_dot", "q4_1", "q4_1_dot"]


@triton.jit
def q4_0(row, group, lane, mask):
    """32 weights in 18 bytes."""
    block = row + group * 18
    return half_at(block, mask)[:, :, None] * (nibbles_at(block + 2, lane, mask) - 8).to(tl.float32)


@triton.jit
def q4_1(row, group, lane, mask):
    """32 weights in 20 bytes."""
    block = row + group * 20
    scale, minimum = half_at(block, mask)[:, :, None], half_at(block + 2, mask)[:, :, None]
    return scale * nibbles_at(block + 4, lane, mask).to(tl.float32) + minimum


@triton.jit
def _dot(row, codes, unit, a, planes, EVEN: tl.constexpr):
    """Of units of 32 codes, at bytes `codes` of rows: products, sums of activations, and the scale of these."""
    c0, c1, c2, c3 = unaligned_16(row, codes, EVEN)
    x0, x1, x2, x3 = activations_at(a, unit, 0, planes)
    y0, y1, y2, y3 = activations_at(a, unit, 1, planes)
    none, zero = tl.zeros(unit.shape, tl.int32), tl.zeros(c0.shape, tl.int32)
    low, high = nibble_dots(c0, c1, c2, c3, x0, x1, x2, x3, y0, y1, y2, y3, zero, zero)
    sums = sum16(x0, x1, x2, x3, sum16(y0, y1, y2, y3, none))
    return low + (high >> 4), sums, scale_at(a, unit, planes)


@triton.jit
def q4_0_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = row + unit * 18
    dots, sums, scale = _dot(row, unit * 18 + 2, unit, a, planes, EVEN)
    return float16_at(block) * ((dots - 8 * sums).to(tl.float32) * scale)


@triton.jit
def q4_1_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = row + unit * 20
    dots, sums, scale = _dot(row, unit * 20 + 4, unit, a, planes, EVEN)
    return (float16_at(block) * dots.to(tl.float32) + float16_at(block + 2) * sums.to(tl.float32)) * scale
