"""Q5_0 and Q5_1 on a GPU: the decoders of `q5_0.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import bytes_at, half_at, nibbles_at

__all__ = ["q5_0", "q5_1"]


@triton.jit
def _fifth_bit(address, lane, mask):
    return ((bytes_at(address, lane // 8, mask) >> (lane % 8)[None, None, :]) & 1) << 4


@triton.jit
def q5_0(row, group, lane, mask):
    """32 weights in 22 bytes."""
    block = row + group * 22
    code = nibbles_at(block + 6, lane, mask) | _fifth_bit(block + 2, lane, mask)
    return half_at(block, mask)[:, :, None] * (code - 16).to(tl.float32)


@triton.jit
def q5_1(row, group, lane, mask):
    """32 weights in 24 bytes."""
    block = row + group * 24
    code = nibbles_at(block + 8, lane, mask) | _fifth_bit(block + 4, lane, mask)
    scale, minimum = half_at(block, mask)[:, :, None], half_at(block + 2, mask)[:, :, None]
    return scale * code.to(tl.float32) + minimum
