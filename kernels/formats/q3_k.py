"""The format Q3_K: 256 weights in 110 bytes, codes of 3 bits, a scale of 6 bits for each 16. Knows its blocks.

The codes' third bits lie in the first 32 bytes, bit g for group g. The scales' lower 4 bits are 8 bytes (0 to 7 low, 8
to 15 high), their upper 2 bits 4 bytes (scale i in byte i mod 4).
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.llvm import I32
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.rounding import nearest, search_signed
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q3_K"]


def _codes(block: Block, group: int) -> ir.Value:
    four, third, b = block.vector(32 + group // 4 * 32, 32), block.vector(0, 32), block.b
    low = b.and_(b.lshr(four, block.constant(2 * (group % 4), four)), block.constant(3, four))
    bit = b.and_(b.lshr(third, block.constant(group, third)), block.constant(1, third))
    return b.or_(low, b.shl(bit, block.constant(2, bit)))


def _scales(block: Block) -> Scales:
    b, low, upper = block.b, block.vector(96, 8), block.vector(104, 4)
    sixteen = ir.Constant(ir.VectorType(I32, 16), list(range(16)))
    four = b.shuffle_vector(
        b.and_(low, block.constant(15, low)), b.lshr(low, block.constant(4, low)), sixteen
    )  # 0 to 7, then 8 to 15
    undefined = ir.Constant(upper.type, ir.Undefined)
    repeated = b.shuffle_vector(upper, undefined, ir.Constant(ir.VectorType(I32, 16), [i % 4 for i in range(16)]))
    shifted = b.lshr(repeated, block.constant([2 * (i // 4) for i in range(16)], repeated))
    two = b.shl(b.and_(shifted, block.constant(3, shifted)), block.constant(4, shifted))
    scales = b.sub(b.or_(four, two), block.constant(32, four))
    return Scales(block.times(block.half(108), scales, signed=True))


@njit(**OPTIONS)
def _search(x: np.ndarray, codes: np.ndarray) -> np.float32:
    """The scale for codes -4 to 3: rounded once, then code by code to the nearest of what least squares gives."""
    extreme = np.float32(0)
    for value in x:
        if abs(value) > abs(extreme):
            extreme = value
    if not abs(extreme) >= np.float32(1e-15):
        return np.float32(0)
    inverse = np.float32(-4) / extreme
    sum_xl, sum_l2 = np.float32(0), np.float32(0)
    for i in range(x.size):
        codes[i] = nearest(inverse * x[i], -4, 3)
        weight = x[i] * x[i]
        sum_xl += weight * x[i] * codes[i]
        sum_l2 += weight * codes[i] * codes[i]
    for _ in range(5):
        changed = False
        for i in range(x.size):
            weight = x[i] * x[i]
            xl = sum_xl - weight * x[i] * codes[i]
            if xl <= 0:
                continue
            l2 = sum_l2 - weight * codes[i] * codes[i]
            code = np.float32(nearest(x[i] * l2 / xl, -4, 3))
            if code == codes[i]:
                continue
            xl += weight * x[i] * code
            l2 += weight * code * code
            if l2 > 0 and xl * xl * sum_l2 > sum_xl * sum_xl * l2:
                codes[i], sum_xl, sum_l2, changed = code, xl, l2, True
        if not changed:
            break
    return sum_xl / sum_l2 if sum_l2 > 0 else np.float32(0)


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    sums = np.empty(16, np.float32)
    scales, work, codes = np.empty(16, np.float32), np.empty(16, np.float32), np.zeros(256, np.uint8)
    for i in range(values.size // 256):
        x, block = values[256 * i : 256 * i + 256], out[110 * i : 110 * i + 110]
        extreme = np.float32(0)
        for g in range(16):
            part = x[16 * g : 16 * g + 16]
            if weights.size:
                own = weights[256 * i + 16 * g : 256 * i + 16 * g + 16]
                scales[g], sums[g] = search_signed(part, own, 4), own.sum()
            else:
                scales[g] = _search(part, work)
            if abs(scales[g]) > abs(extreme):
                extreme = scales[g]
        block[:] = 0
        inverse = np.float32(-32) / extreme if extreme != 0 else np.float32(np.nan)
        if weights.size:
            d = to_half(search_signed(scales, sums, 32), block, 108)
            inverse = np.float32(1) / d if d != 0 else np.float32(np.nan)
        else:
            d = to_half(extreme / np.float32(-32), block, 108)
        for g in range(16):
            scale = nearest(inverse * scales[g], -32, 31)  # of no number: -32
            step, scale = d * np.float32(scale), scale + 32
            block[96 + g % 8] |= (scale & 15) << 4 * (g // 8)
            block[104 + g % 4] |= scale >> 4 << 2 * (g // 4)
            for j in range(16 * g, 16 * g + 16):
                codes[j] = nearest(x[j] / step, -4, 3) + 4 if step != 0 else 4
        for j in range(256):
            group, position = j // 32, j % 32
            block[position] |= codes[j] >> 2 << group
            block[32 + group // 4 * 32 + position] |= (codes[j] & 3) << 2 * (group % 4)


Q3_K = BlockFormat("q3_k", 256, 110, "q8", 16, 4, 7, _codes, _scales, _encode, Weighting(2.0))
