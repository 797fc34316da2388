"""Q4_0 and Q4_1 on a GPU: the decoders of `q4_0.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import half_at, nibbles_at

__all__ = ["q4_0", "q4_1"]


@triton.jit
def q4_0(row, group, lane, mask):
    """32 weights in 18 bytes."""
    block = row + group * 18
    return half_at(block, mask)[:, :, None] * (nibbles_at(block + 2, lane, mask) - 8).to(tl.float32)


@triton.jit
def q4_1(row, group, lane, mask):
    """32 weights in 20 bytes."""
    block = row + group * 20
    scale, minimum = half_at(block, mask)[:, :, None], half_at(block + 2, mask)[:, :, None]
    return scale * nibbles_at(block + 4, lane, mask).to(tl.float32) + minimum
