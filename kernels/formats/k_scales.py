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
from fiddler.kernels.formats.rounding import nearest, search_positive, search_range

__all__ = ["encode_scales", "k_scales", "scale_codes"]


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
def scale_codes(
    values: np.ndarray, weights: np.ndarray, largest: int, block: np.ndarray, offset: int, codes: np.ndarray
) -> np.float32:
    """Codes 0 to `largest` of values (>= 0); writes their scale to a block, as float16, and returns it.

    weights: of the values' errors, or none: then the greatest value has the largest code.
    """
    d: np.float32
    if weights.size:
        d = to_half(search_positive(values, weights, largest), block, offset)
        inverse = np.float32(1) / d if d > 0 else np.float32(0)
    else:
        top = max(values.max(), np.float32(0))
        d = to_half(top / np.float32(largest), block, offset)
        inverse = np.float32(largest) / top if top > 0 else np.float32(0)
    for g in range(values.size):
        codes[g] = nearest(inverse * values[g], 0, largest)
    return d


@njit(**OPTIONS)
def _choose(
    x: np.ndarray, weights: np.ndarray, largest: int, candidates: tuple[float, float, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales and minimums of 8 x 32 values, and the sums of their weights: none where `weights` are none."""
    scales, minimums, sums = np.empty(8, np.float32), np.empty(8, np.float32), np.empty(8, np.float32)
    own, work = np.empty(32, np.float32), np.empty(32, np.float32)
    for g in range(8):
        part = x[32 * g : 32 * g + 32]
        if weights.size:
            own[:] = weights[32 * g : 32 * g + 32]
            scales[g], minimums[g] = search_range(part, own, largest, (-0.9, 0.05, 36), False, work)
            sums[g] = own.sum()
            continue
        squares = np.float32(0)
        for value in part:
            squares += value * value
        for i in range(32):
            own[i] = np.sqrt(squares / np.float32(32)) + abs(part[i])
        scales[g], minimums[g] = search_range(part, own, largest, candidates, False, work)
    return scales, minimums, sums if weights.size else sums[:0]


@njit(**OPTIONS)
def encode_scales(
    x: np.ndarray,
    weights: np.ndarray,
    largest: int,
    candidates: tuple[float, float, int],
    block: np.ndarray,
    codes: np.ndarray,
) -> None:
    """Choose and write the first 16 bytes of a block of 256 values, and each value's code, 0 to `largest`.

    weights: of the values' errors, or none. candidates: as of `search_range`, without weights.
    """
    scales, minimums, sums = _choose(x, weights, largest, candidates)
    scale_of, minimum_of = np.empty(8, np.uint8), np.empty(8, np.uint8)
    d, dmin = scale_codes(scales, sums, 63, block, 0, scale_of), scale_codes(minimums, sums, 63, block, 2, minimum_of)
    block[4:16] = 0
    for g in range(8):
        scale, minimum = int(scale_of[g]), int(minimum_of[g])
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
