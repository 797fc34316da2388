"""Q8_0 on a GPU: the decoder of `q8_0.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import half_at, signed_bytes_at

__all__ = ["q8_0"]


@triton.jit
def q8_0(row, group, lane, mask):
    """32 weights in 34 bytes."""
    block = row + group * 34
    return half_at(block, mask)[:, :, None] * signed_bytes_at(block + 2, lane, mask).to(tl.float32)
