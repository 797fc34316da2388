"""Q5_K on a GPU: the decoder of `q5_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.k_scales_triton import k_scale_and_minimum, k_scaled
from fiddler.kernels.formats.triton_loads import bytes_at
from fiddler.kernels.formats.triton_words import activations_at, dot16, nibble_dots, sum16, words_at

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
def q5_k_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 64 weights: those whose codes share 32 bytes. See `triton_words` for the arguments."""
    block, shift = row + unit // 4 * 176, unit % 4 * 2
    low, high = tl.zeros(block.shape, tl.int32), tl.zeros(block.shape, tl.int32)
    low_bits, high_bits = tl.zeros(block.shape, tl.int32), tl.zeros(block.shape, tl.int32)
    low_sum, high_sum = tl.zeros(unit.shape, tl.int32), tl.zeros(unit.shape, tl.int32)
    m, n = 0x01010101 << shift, 0x02020202 << shift
    for half in tl.static_range(2):
        c0, c1, c2, c3 = words_at(block + (48 + 16 * half + unit % 4 * 32))
        x0, x1, x2, x3 = activations_at(a, 2 * unit, half, planes)
        y0, y1, y2, y3 = activations_at(a, 2 * unit + 1, half, planes)
        low, high = nibble_dots(c0, c1, c2, c3, x0, x1, x2, x3, y0, y1, y2, y3, low, high)
        c0, c1, c2, c3 = words_at(block + (16 + 16 * half))  # bit 2 i and 2 i + 1: of the groups of unit i
        low_bits = dot16(c0 & m, c1 & m, c2 & m, c3 & m, x0, x1, x2, x3, low_bits)
        high_bits = dot16(c0 & n, c1 & n, c2 & n, c3 & n, y0, y1, y2, y3, high_bits)
        low_sum, high_sum = sum16(x0, x1, x2, x3, low_sum), sum16(y0, y1, y2, y3, high_sum)
    low, high = low + (low_bits >> shift) * 16, (high >> 4) + (high_bits >> shift) * 8
    return k_scaled(block, unit, low, high, low_sum, high_sum, a, planes)
