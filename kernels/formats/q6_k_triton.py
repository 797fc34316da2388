"""Q6_K on a GPU: the decoder of `q6_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import bytes_at, half_at, signed_at

__all__ = ["q6_k"]


@triton.jit
def q6_k(row, group, lane, mask):
    """256 weights in 210 bytes, with a scale for each 16."""
    block, group = row + group // 8 * 210, group % 8
    half, quarter, d = group // 4, group % 4, half_at(block + 208, mask)
    first, second = signed_at(block + (192 + 2 * group), mask), signed_at(block + (193 + 2 * group), mask)
    first, second = (d * first.to(tl.float32))[:, :, None], (d * second.to(tl.float32))[:, :, None]
    scale = tl.where((lane < 16)[None, None, :], first, second)
    low = (bytes_at(block + (64 * half + quarter % 2 * 32), lane, mask) >> (quarter // 2 * 4)[:, :, None]) & 15
    high = ((bytes_at(block + (128 + 32 * half), lane, mask) >> (2 * quarter)[:, :, None]) & 3) << 4
    return scale * ((low | high) - 32).to(tl.float32)
