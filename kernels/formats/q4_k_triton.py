"""Q4_K on a GPU: the decoder of `q4_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.k_scales_triton import k_scale_and_minimum, k_scaled
from fiddler.kernels.formats.triton_loads import bytes_at
from fiddler.kernels.formats.triton_words import activations_at, dot16, sum16, words_at

__all__ = ["q4_k", "q4_k_dot"]


@triton.jit
def q4_k(row, group, lane, mask):
    """256 weights in 144 bytes."""
    block, group = row + group // 8 * 144, group % 8
    scale, minimum = k_scale_and_minimum(block, group, mask)
    code = (bytes_at(block + (16 + group // 2 * 32), lane, mask) >> (group % 2 * 4)[:, :, None]) & 15
    return scale[:, :, None] * code.to(tl.float32) - minimum[:, :, None]


@triton.jit
def q4_k_dot(row, unit, a, planes):
    """Units of 64 weights: those whose codes share 32 bytes. See `triton_words` for the arguments."""
    block = (row + unit // 4 * 144).to(tl.int64)
    c0, c1, c2, c3 = words_at(block + (16 + unit % 4 * 32))
    c4, c5, c6, c7 = words_at(block + (32 + unit % 4 * 32))
    m: tl.constexpr = 0x0F0F0F0F
    zero, low, high = tl.zeros(unit.shape, tl.int32), tl.zeros(c0.shape, tl.int32), tl.zeros(c0.shape, tl.int32)
    x0, x1, x2, x3 = activations_at(a, 2 * unit, 0, planes)
    low, low_sum = dot16(c0 & m, c1 & m, c2 & m, c3 & m, x0, x1, x2, x3, low), sum16(x0, x1, x2, x3, zero)
    x0, x1, x2, x3 = activations_at(a, 2 * unit, 1, planes)
    low, low_sum = dot16(c4 & m, c5 & m, c6 & m, c7 & m, x0, x1, x2, x3, low), sum16(x0, x1, x2, x3, low_sum)
    x0, x1, x2, x3 = activations_at(a, 2 * unit + 1, 0, planes)
    high = dot16(c0 >> 4 & m, c1 >> 4 & m, c2 >> 4 & m, c3 >> 4 & m, x0, x1, x2, x3, high)
    high_sum = sum16(x0, x1, x2, x3, zero)
    x0, x1, x2, x3 = activations_at(a, 2 * unit + 1, 1, planes)
    high = dot16(c4 >> 4 & m, c5 >> 4 & m, c6 >> 4 & m, c7 >> 4 & m, x0, x1, x2, x3, high)
    high_sum = sum16(x0, x1, x2, x3, high_sum)
    return k_scaled(block, unit, low, high, low_sum, high_sum, a, planes)
