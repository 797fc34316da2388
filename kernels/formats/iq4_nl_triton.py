"""IQ4_NL and IQ4_XS on a GPU: decoders of `iq4_nl.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, half_at, nibbles_at

__all__ = ["iq4_nl", "iq4_xs"]


@triton.jit
def _looked_up(code):
    """The step that a code stands for; the table's entries, plus 128, are bytes of four words."""
    word = tl.where(
        code < 8,
        tl.where(code < 4, 0x3F2D1801, 0x766A5D4F),
        tl.where(code < 12, -0x5966727F, -0x0E263A4B),
    )
    return ((word >> (code % 4 * 8)) & 255) - 128


@triton.jit
def iq4_nl(row, group, lane, mask):
    """32 weights in 18 bytes."""
    block = row + group * 18
    return half_at(block, mask)[:, :, None] * _looked_up(nibbles_at(block + 2, lane, mask)).to(tl.float32)


@triton.jit
def iq4_xs(row, group, lane, mask):
    """256 weights in 136 bytes."""
    block, group = row + group // 8 * 136, group % 8
    low = (byte_at(block + (4 + group // 2), mask) >> (group % 2 * 4)) & 15
    high = ((byte_at(block + (2 + group // 4), mask) >> (group % 4 * 2)) & 3) << 4
    scale = half_at(block, mask) * ((low | high) - 32).to(tl.float32)
    return scale[:, :, None] * _looked_up(nibbles_at(block + (8 + 16 * group), lane, mask)).to(tl.float32)
