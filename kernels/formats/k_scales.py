"""The 8 scales and 8 minimums of 6 bits in 12 bytes, of Q4_K and Q5_K. Knows this layout alone.

Bytes 0 to 3: scales 0 to 3, and the upper 2 bits of scales 4 to 7; bytes 4 to 7: the same of the minimums; bytes 8 to
11: the lower 4 bits of scales 4 to 7, and above them those of the minimums.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.llvm import I8, I32, I64
from fiddler.kernels.formats.block_format import Block, Scales
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.rounding import nearest, search_range

__all__ = ["encode_scales", "k_scales"]


def k_scales(block: Block) -> Scales:
    """Scales and minimums of a block: float16 at 0 and 2, then the 12 bytes."""
    b = block.b
    first, second, third = (block.integer(offset, I32) for offset in (4, 8, 12))

    def bytes_of(four: ir.Value, upper: ir.Value, lower: ir.Value) -> ir.Value:
        low = b.and_(four, ir.Constant(I32, 0x3F3F3F3F))
        top = b.and_(b.lshr(upper, ir.Constant(I32, 2)), ir.Constant(I32, 0x30303030))
        high = b.or_(b.and_(lower, ir.Constant(I32, 0x0F0F0F0F)), top)
        both = b.or_(b.zext(low, I64), b.shl(b.zext(high, I64), ir.Constant(I64, 32)))
        return b.bitcast(both, ir.VectorType(I8, 8))

    scales = bytes_of(first, first, third)
    minimums = bytes_of(second, second, b.lshr(third, ir.Constant(I32, 4)))
    return Scales(block.times(block.half(0), scales), block.times(block.half(2), minimums))


@njit(**OPTIONS)
def encode_scales(x: np.ndarray, largest: int, first: float, steps: int, block: np.ndarray, codes: np.ndarray) -> None:
    """Choose and write the first 16 bytes of a block of 256 values, and each value's code, 0 to `largest`."""
    scales, minimums = np.empty(8, np.float32), np.empty(8, np.float32)
    weights, work = np.empty(32, np.float32), np.empty(32, np.float32)
    for g in range(8):
        part = x[32 * g : 32 * g + 32]
        squares = np.float32(0)
        for value in part:
            squares += value * value
        for i in range(32):
            weights[i] = np.sqrt(squares / np.float32(32)) + abs(part[i])
        scales[g], minimums[g] = search_range(part, weights, largest, first, steps, False, work)
    top_scale, top_minimum = max(scales.max(), np.float32(0)), max(minimums.max(), np.float32(0))
    d, dmin = to_half(top_scale / np.float32(63), block, 0), to_half(top_minimum / np.float32(63), block, 2)
    block[4:16] = 0
    for g in range(8):
        scale = nearest(np.float32(63) / top_scale * scales[g], 0, 63) if top_scale > 0 else 0
        minimum = nearest(np.float32(63) / top_minimum * minimums[g], 0, 63) if top_minimum > 0 else 0
        if g < 4:
            block[4 + g] |= scale
            block[8 + g] |= minimum
        else:
            block[g] |= scale >> 4 << 6
            block[4 + g] |= minimum >> 4 << 6
            block[8 + g] = scale & 15 | (minimum & 15) << 4
        step, least = d * np.float32(scale), dmin * np.float32(minimum)
        for i in range(32 * g, 32 * g + 32):
            codes[i] = nearest((x[i] + least) / step, 0, largest) if step != 0 else 0
