"""The format Q2_K: 256 weights in 84 bytes, codes of 2 bits, scales and minimums of 4 for each 16. Knows its blocks."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales
from fiddler.kernels.formats.k_scales import scale_codes
from fiddler.kernels.formats.rounding import nearest, search_range
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q2_K"]


def _codes(block: Block, group: int) -> ir.Value:
    four, b = block.vector(16 + group // 4 * 32, 32), block.b
    return b.and_(b.lshr(four, block.constant(2 * (group % 4), four)), block.constant(3, four))


def _scales(block: Block) -> Scales:
    both, b = block.vector(0, 16), block.b
    scales, minimums = b.and_(both, block.constant(15, both)), b.lshr(both, block.constant(4, both))
    return Scales(block.times(block.half(80), scales), block.times(block.half(82), minimums))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    scales, minimums, sums = np.empty(16, np.float32), np.empty(16, np.float32), np.empty(16, np.float32)
    scale_of, minimum_of = np.empty(16, np.uint8), np.empty(16, np.uint8)
    codes, work = np.zeros(256, np.uint8), np.empty(16, np.float32)
    for i in range(values.size // 256):
        x, block = values[256 * i : 256 * i + 256], out[84 * i : 84 * i + 84]
        for g in range(16):
            part = x[16 * g : 16 * g + 16]
            if weights.size:
                own = weights[256 * i + 16 * g : 256 * i + 16 * g + 16]
                scales[g], minimums[g] = search_range(part, own, 3, (-0.9, 0.05, 36), False, work)
                sums[g] = own.sum()
            else:
                scales[g], minimums[g] = search_range(part, np.abs(part), 3, (-0.5, 0.1, 15), True, work)
        of_groups = sums if weights.size else sums[:0]
        d = scale_codes(scales, of_groups, 15, block, 80, scale_of)
        dmin = scale_codes(minimums, of_groups, 15, block, 82, minimum_of)
        for g in range(16):
            scale, minimum = int(scale_of[g]), int(minimum_of[g])
            block[g] = scale | minimum << 4
            step, least = d * np.float32(scale), dmin * np.float32(minimum)
            for j in range(16 * g, 16 * g + 16):
                codes[j] = nearest((x[j] + least) / step, 0, 3) if step != 0 else 0
        for half in range(2):
            for j in range(32):
                four = 0
                for quarter in range(4):
                    four |= codes[128 * half + 32 * quarter + j] << 2 * quarter
                block[16 + 32 * half + j] = four


Q2_K = BlockFormat("q2_k", 256, 84, "q8", 16, 0, 3, _codes, _scales, _encode, Weighting(1.0))
