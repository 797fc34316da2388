"""Q4_K on a GPU: the decoder of `q4_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.k_scales_triton import k_scale_and_minimum, k_scaled
from fiddler.kernels.formats.triton_loads import bytes_at
from fiddler.kernels.formats.triton_words import activations_at, nibble_dots, sum16, words_at

__all__ = ["q4_k", "q4_k_dot"]


@triton.jit
def q4_k(row, group, lane, mask):
    """256 weights in 144 bytes."""
    block, group = row + group // 8 * 144, group % 8
    scale, minimum = k_scale_and_minimum(block, group, mask)
    code = (bytes_at(block + (16 + group // 2 * 32), lane, mask) >> (group % 2 * 4)[:, :, None]) & 15
    return scale[:, :, None] * code.to(tl.float32) - minimum[:, :, None]


@triton.jit
def q4_k_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 64 weights: those whose codes share 32 bytes. See `triton_words` for the arguments."""
    block = row + unit // 4 * 144
    low, high = tl.zeros(block.shape, tl.int32), tl.zeros(block.shape, tl.int32)
    low_sum, high_sum = tl.zeros(unit.shape, tl.int32), tl.zeros(unit.shape, tl.int32)
    for half in tl.static_range(2):
        c0, c1, c2, c3 = words_at(block + (16 + 16 * half + unit % 4 * 32))
        x0, x1, x2, x3 = activations_at(a, 2 * unit, half, planes)
        y0, y1, y2, y3 = activations_at(a, 2 * unit + 1, half, planes)
        low, high = nibble_dots(c0, c1, c2, c3, x0, x1, x2, x3, y0, y1, y2, y3, low, high)
        low_sum, high_sum = sum16(x0, x1, x2, x3, low_sum), sum16(y0, y1, y2, y3, high_sum)
    return k_scaled(block, unit, low, high >> 4, low_sum, high_sum, a, planes)
