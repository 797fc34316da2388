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
    nibble_dots,
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
def q6_k_dot(row, unit, a, planes, EVEN: tl.constexpr):
    """Units of 32 weights: halves of two groups, whose low bits share 16 bytes. See `triton_words`."""
    block, part = unit // 8 * 210, unit % 8
    group, half = unit // 8 * 8 + part // 4 * 4 + part % 4 // 2, part % 2  # and the next group but one
    x0, x1, x2, x3 = activations_at(a, group, half, planes)
    y0, y1, y2, y3 = activations_at(a, group + 2, half, planes)
    none, zero = tl.zeros(unit.shape, tl.int32), tl.zeros((row + unit).shape, tl.int32)
    c0, c1, c2, c3 = unaligned_16(row, block + part * 16, EVEN)
    low, high = nibble_dots(c0, c1, c2, c3, x0, x1, x2, x3, y0, y1, y2, y3, zero, zero)
    c0, c1, c2, c3 = unaligned_16(row, block + (128 + part // 4 * 32 + half * 16), EVEN)
    shift = part % 4 // 2 * 2
    m, n = 0x03030303 << shift, 0x30303030 << shift
    low_bits = dot16(c0 & m, c1 & m, c2 & m, c3 & m, x0, x1, x2, x3, zero) >> shift
    high_bits = dot16(c0 & n, c1 & n, c2 & n, c3 & n, y0, y1, y2, y3, zero) >> shift
    low += (low_bits - 2 * sum16(x0, x1, x2, x3, none)) * 16
    high = (high >> 4) + high_bits - 32 * sum16(y0, y1, y2, y3, none)
    scales = row + block + (192 + part // 4 * 8 + part % 4)
    low, high = (low * int8_at(scales)).to(tl.float32), (high * int8_at(scales + 4)).to(tl.float32)
    return float16_at(row + block + 208) * (low * scale_at(a, group, planes) + high * scale_at(a, group + 2, planes))
