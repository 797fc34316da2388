"""The scales and minimums of Q4_K and Q5_K on a GPU: `k_scales.py` in Triton. Knows this layout alone."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, half_at
from fiddler.kernels.formats.triton_words import half_of, scales_at, words_at

__all__ = ["k_scale_and_minimum", "k_scaled"]


@triton.jit
def k_scale_and_minimum(block, group, mask):
    """A group's scale and minimum, float32. group: its number in the block, 0 to 7."""
    at = block + group % 4
    first, second, third = byte_at(at + 4, mask), byte_at(at + 8, mask), byte_at(at + 12, mask)
    scale = tl.where(group < 4, first & 63, third & 15 | first >> 6 << 4)
    minimum = tl.where(group < 4, second & 63, third >> 4 | second >> 6 << 4)
    return half_at(block, mask) * scale.to(tl.float32), half_at(block + 2, mask) * minimum.to(tl.float32)


@triton.jit
def k_scaled(block, unit, low, high, low_sum, high_sum, a, planes):
    """What units of 64 weights add to a product, float32, from the sums of its two groups, low and high.

    block: int64 addresses, multiples of 16. low, high: int32, codes times activations; low_sum, high_sum: activations.
    """
    halves, first, second, third = words_at(block)
    shift, late = unit % 2 * 16, unit % 4 >= 2
    first, second, third = first >> shift, second >> shift, third >> shift
    scale = tl.where(late, third & 0x0F0F | first >> 2 & 0x3030, first & 0x3F3F)
    minimum = tl.where(late, third >> 4 & 0x0F0F | second >> 2 & 0x3030, second & 0x3F3F)
    low_scale, high_scale = scales_at(a, unit, planes)
    codes = (low * (scale & 255)).to(tl.float32) * low_scale + (high * (scale >> 8)).to(tl.float32) * high_scale
    minima = (low_sum * (minimum & 255)).to(tl.float32) * low_scale
    minima += (high_sum * (minimum >> 8)).to(tl.float32) * high_scale
    return half_of(halves) * codes - half_of(halves >> 16) * minima
