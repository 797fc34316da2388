"""Q8_0 on a GPU: the decoder of `q8_0.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import half_at, signed_bytes_at
from fiddler.kernels.formats.triton_words import float16_at, group_dot, scale_at, unaligned_32

__all__ = ["q8_0", "q8_0_dot"]


@triton.jit
def q8_0(row, group, lane, mask):
    """32 weights in 34 bytes."""
    block = row + group * 34
    return half_at(block, mask)[:, :, None] * signed_bytes_at(block + 2, lane, mask).to(tl.float32)


@triton.jit
def q8_0_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = unit * 34
    c0, c1, c2, c3, c4, c5, c6, c7 = unaligned_32(row, block + 2, EVEN)
    dots = group_dot(c0, c1, c2, c3, c4, c5, c6, c7, a, unit, planes)
    return float16_at(row + block) * (dots.to(tl.float32) * scale_at(a, unit, planes))
