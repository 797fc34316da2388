"""Q4_K on a GPU: the decoder of `q4_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.k_scales_triton import k_scale_and_minimum
from fiddler.kernels.formats.triton_loads import bytes_at

__all__ = ["q4_k"]


@triton.jit
def q4_k(row, group, lane, mask):
    """256 weights in 144 bytes."""
    block, group = row + group // 8 * 144, group % 8
    scale, minimum = k_scale_and_minimum(block, group, mask)
    code = (bytes_at(block + (16 + group // 2 * 32), lane, mask) >> (group % 2 * 4)[:, :, None]) & 15
    return scale[:, :, None] * code.to(tl.float32) - minimum[:, :, None]
