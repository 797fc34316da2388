"""Q5_K on a GPU: the decoder of `q5_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.k_scales_triton import k_scale_and_minimum, k_scaled
from fiddler.kernels.formats.triton_loads import bytes_at
from fiddler.kernels.formats.triton_words import activations_at, dot16, sum16, words_at

__all__ = ["q5_k", "q5_k_dot"]


@triton.jit
def q5_k(row, group, lane, mask):
    """256 weights in 176 bytes."""
    block, group = row + group // 8 * 176, group % 8
    scale, minimum = k_scale_and_minimum(block, group, mask)
    low = (bytes_at(block + (48 + group // 2 * 32), lane, mask) >> (group % 2 * 4)[:, :, None]) & 15
    high = ((bytes_at(block + 16, lane, mask) >> group[:, :, None]) & 1) << 4
    return scale[:, :, None] * (low | high).to(tl.float32) - minimum[:, :, None]


@triton.jit
def _fifth(code, bits, shift):
    """Codes with the fifth bit of each: of the low codes, and of the high ones."""
    bits = bits >> shift
    return code & 0x0F0F0F0F | bits << 4 & 0x10101010, code >> 4 & 0x0F0F0F0F | bits << 3 & 0x10101010


@triton.jit
def _half(block, unit, half, a, planes, low, high, low_sum, high_sum):
    """The first or the last 16 weights of both groups, added to their sums."""
    shift = unit % 4 * 2
    b0, b1, b2, b3 = words_at(block + (16 + 16 * half))
    c0, c1, c2, c3 = words_at(block + (48 + 16 * half + unit % 4 * 32))
    c0, d0 = _fifth(c0, b0, shift)
    c1, d1 = _fifth(c1, b1, shift)
    c2, d2 = _fifth(c2, b2, shift)
    c3, d3 = _fifth(c3, b3, shift)
    x0, x1, x2, x3 = activations_at(a, 2 * unit, half, planes)
    low, low_sum = dot16(c0, c1, c2, c3, x0, x1, x2, x3, low), sum16(x0, x1, x2, x3, low_sum)
    x0, x1, x2, x3 = activations_at(a, 2 * unit + 1, half, planes)
    high, high_sum = dot16(d0, d1, d2, d3, x0, x1, x2, x3, high), sum16(x0, x1, x2, x3, high_sum)
    return low, high, low_sum, high_sum


@triton.jit
def q5_k_dot(row, unit, a, planes):
    """Units of 64 weights: those whose codes share 32 bytes. See `triton_words` for the arguments."""
    block = (row + unit // 4 * 176).to(tl.int64)
    zero, none = tl.zeros(block.shape, tl.int32), tl.zeros(unit.shape, tl.int32)
    low, high, low_sum, high_sum = _half(block, unit, 0, a, planes, zero, zero, none, none)
    low, high, low_sum, high_sum = _half(block, unit, 1, a, planes, low, high, low_sum, high_sum)
    return k_scaled(block, unit, low, high, low_sum, high_sum, a, planes)
