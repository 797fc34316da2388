"""MXFP4 on a GPU: the decoder of `mxfp4.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, nibbles_at

__all__ = ["mxfp4"]


@triton.jit
def mxfp4(row, group, lane, mask):
    """32 weights in 17 bytes."""
    block = row + group * 17
    exponent, code = byte_at(block, mask), nibbles_at(block + 1, lane, mask)
    bits = tl.where(exponent < 2, 0x00200000 << (exponent & 1), (exponent - 1) << 23)
    magnitude = (-0x379BCDF0 >> (code % 8 * 4)) & 15  # twice the number: 0, 1, 2, 3, 4, 6, 8, 12 in a word
    return bits.to(tl.float32, bitcast=True)[:, :, None] * tl.where(code < 8, magnitude, -magnitude).to(tl.float32)
