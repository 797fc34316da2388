"""Q6_K on a GPU: the decoder of `q6_k.py`'s blocks in Triton. See `triton_loads` for a decoder's arguments."""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.kernels.formats.triton_loads import bytes_at, half_at, signed_at
from fiddler.kernels.formats.triton_words import (
    activations_at,
    dot16,
    float16_at,
    int8_at,
    scale_at,
    sum16,
    unaligned_16,
)

__all__ = ["q6_k", "q6_k_dot"]


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


@triton.jit
def _six(code, bits, shift):
    """Codes with the two high bits of each: of the low codes, and of the high ones."""
    bits = bits >> shift
    return code & 0x0F0F0F0F | bits << 4 & 0x30303030, code >> 4 & 0x0F0F0F0F | bits & 0x30303030


@triton.jit
def q6_k_dot(row, unit, a, planes):
    """Units of 32 weights: halves of two groups, whose low bits share 16 bytes. See `triton_words`."""
    block, part = (row + unit // 8 * 210).to(tl.int64), unit % 8
    group, half = unit // 8 * 8 + part // 4 * 4 + part % 4 // 2, part % 2  # and the next group but one
    c0, c1, c2, c3 = unaligned_16(block + part * 16)
    b0, b1, b2, b3 = unaligned_16(block + (128 + part // 4 * 32 + half * 16))
    shift = part % 4 // 2 * 2
    c0, d0 = _six(c0, b0, shift)
    c1, d1 = _six(c1, b1, shift)
    c2, d2 = _six(c2, b2, shift)
    c3, d3 = _six(c3, b3, shift)
    zero, scales = tl.zeros(unit.shape, tl.int32), block + (192 + part // 4 * 8 + part % 4)
    x0, x1, x2, x3 = activations_at(a, group, half, planes)
    first = dot16(c0, c1, c2, c3, x0, x1, x2, x3, -32 * sum16(x0, x1, x2, x3, zero))
    x0, x1, x2, x3 = activations_at(a, group + 2, half, planes)
    second = dot16(d0, d1, d2, d3, x0, x1, x2, x3, -32 * sum16(x0, x1, x2, x3, zero))
    first, second = first * int8_at(scales), second * int8_at(scales + 4)
    total = first.to(tl.float32) * scale_at(a, group, planes) + second.to(tl.float32) * scale_at(a, group + 2, planes)
    return float16_at(block + 208) * total
