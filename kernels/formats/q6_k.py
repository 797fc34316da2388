"""The format Q6_K: 256 weights in 210 bytes, codes of 6 bits, an int8 scale for each 16. Knows its blocks.

Each half of 128 weights: 64 bytes with the lower 4 bits of 0 to 63 and, above them, of 64 to 127, and 32 bytes with the
upper 2 bits of each quarter.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.rounding import nearest, search_signed
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q6_K"]


def _codes(block: Block, group: int) -> ir.Value:
    half, quarter, b = group // 4, group % 4, block.b
    both, upper = block.vector(64 * half + quarter % 2 * 32, 32), block.vector(128 + 32 * half, 32)
    low = b.lshr(both, block.constant(4, both)) if quarter >= 2 else b.and_(both, block.constant(15, both))
    two = b.and_(upper, block.constant([3, 12, 48, -64][quarter], upper))
    shift = 4 - 2 * quarter
    if shift:
        two = (b.shl if shift > 0 else b.lshr)(two, block.constant(abs(shift), two))
    return b.or_(low, two)


def _pair(block: Block, i: int) -> ir.Value:
    half, upper_half, b = i // 2, i % 2, block.b
    both, upper = block.vector(64 * half, 64), block.twice(128 + 32 * half)
    two = b.and_(block.shifted(upper, (0, -2) if upper_half else (4, 2)), block.constant(0x30, upper))
    return b.or_(b.and_(block.shifted(both, (-4, -4) if upper_half else (0, 0)), block.constant(15, both)), two)


def _scales(block: Block) -> Scales:
    return Scales(block.times(block.half(208), block.vector(192, 16), signed=True))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    scales, codes = np.empty(16, np.float32), np.zeros(256, np.uint8)
    for i in range(values.size // 256):
        x, block = values[256 * i : 256 * i + 256], out[210 * i : 210 * i + 210]
        extreme = np.float32(0)
        for g in range(16):
            part = x[16 * g : 16 * g + 16]
            own = weights[256 * i + 16 * g : 256 * i + 16 * g + 16] if weights.size else part * part
            scales[g] = search_signed(part, own, 32)
            if abs(scales[g]) > abs(extreme):
                extreme = scales[g]
        block[:] = 0
        if abs(extreme) < np.float32(1e-15):
            continue
        inverse = np.float32(-128) / extreme
        d = to_half(np.float32(1) / inverse, block, 208)
        for g in range(16):
            scale = nearest(inverse * scales[g], -128, 127)
            block[192 + g] = scale & 255
            step = d * np.float32(scale)
            for j in range(16 * g, 16 * g + 16):
                codes[j] = nearest(x[j] / step, -32, 31) + 32 if step != 0 else 32
        for half in range(2):
            for j in range(64):
                low = 128 * half + j
                block[64 * half + j] = codes[low] & 15 | (codes[low + 64] & 15) << 4
            for j in range(32):
                upper = 0
                for quarter in range(4):
                    upper |= codes[128 * half + 32 * quarter + j] >> 4 << 2 * quarter
                block[128 + 32 * half + j] = upper


Q6_K = BlockFormat("q6_k", 256, 210, "q8", 16, 32, 63, _codes, _scales, _encode, Weighting(0.0, plain=True), _pair)
