"""IQ4_NL and IQ4_XS on a GPU: decoders of `iq4_nl.py`'s blocks in Triton. See `triton_loads` for their arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import byte_at, half_at, nibbles_at
from fiddler.kernels.formats.triton_words import (
    byte_of_16,
    float16_at,
    group_dot,
    half_bits_at,
    int8_at,
    scale_at,
    unaligned_16,
)

__all__ = ["iq4_nl", "iq4_nl_dot", "iq4_xs", "iq4_xs_dot"]


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


@triton.jit
def _dot(row, codes, unit, a, planes, EVEN: tl.constexpr):
    """Of units of 32 codes, at bytes `codes` of rows: products with activations, float32, less the weights' scale."""
    c0, c1, c2, c3 = unaligned_16(row, codes, EVEN)
    c0, d0 = byte_of_16(c0, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535)
    c1, d1 = byte_of_16(c1, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535)
    c2, d2 = byte_of_16(c2, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535)
    c3, d3 = byte_of_16(c3, -0x4052677F, -0x09152231, 0x26190D01, 0x71594535)
    dots = group_dot(c0, c1, c2, c3, d0, d1, d2, d3, a, unit, planes)
    return dots.to(tl.float32) * scale_at(a, unit, planes)


@triton.jit
def iq4_nl_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block = row + unit * 18
    return float16_at(block) * _dot(row, unit * 18 + 2, unit, a, planes, EVEN)


@triton.jit
def iq4_xs_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights. See `triton_words` for the arguments."""
    block, part = row + unit // 8 * 136, unit % 8
    low = int8_at(block + (4 + part // 2)) >> part % 2 * 4 & 15
    high = half_bits_at(block + 2) >> part * 2 & 3
    scale = float16_at(block) * ((low | high << 4) - 32).to(tl.float32)
    return scale * _dot(row, unit // 8 * 136 + part * 16 + 8, unit, a, planes, EVEN)
