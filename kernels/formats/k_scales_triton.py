"""The scales and minimums of Q4_K and Q5_K on a GPU: `k_scales.py` in Triton. Knows this layout alone."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, half_at

__all__ = ["k_scale_and_minimum"]


@triton.jit
def k_scale_and_minimum(block, group, mask):
    """A group's scale and minimum, float32. group: its number in the block, 0 to 7."""
    at = block + group % 4
    first, second, third = byte_at(at + 4, mask), byte_at(at + 8, mask), byte_at(at + 12, mask)
    scale = tl.where(group < 4, first & 63, third & 15 | first >> 6 << 4)
    minimum = tl.where(group < 4, second & 63, third >> 4 | second >> 6 << 4)
    return half_at(block, mask) * scale.to(tl.float32), half_at(block + 2, mask) * minimum.to(tl.float32)
