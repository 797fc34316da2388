"""The format Q2_K: 256 weights in 84 bytes, codes of 2 bits, scales and minimums of 4 for each 16. Knows its blocks."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.rounding import nearest, search_range

__all__ = ["Q2_K"]


def _codes(block: Block, group: int) -> ir.Value:
    four, b = block.vector(16 + group // 4 * 32, 32), block.b
    return b.and_(b.lshr(four, block.constant(2 * (group % 4), four)), block.constant(3, four))


def _scales(block: Block) -> Scales:
    both, b = block.vector(0, 16), block.b
    scales, minimums = b.and_(both, block.constant(15, both)), b.lshr(both, block.constant(4, both))
    return Scales(block.times(block.half(80), scales), block.times(block.half(82), minimums))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, out: np.ndarray) -> None:
    scales, minimums = np.empty(16, np.float32), np.empty(16, np.float32)
    codes, work = np.zeros(256, np.uint8), np.empty(16, np.float32)
    for i in range(values.size // 256):
        x, block = values[256 * i : 256 * i + 256], out[84 * i : 84 * i + 84]
        for g in range(16):
            part = x[16 * g : 16 * g + 16]
            scales[g], minimums[g] = search_range(part, np.abs(part), 3, -0.5, 15, True, work)
        top_scale, top_minimum = max(scales.max(), np.float32(0)), max(minimums.max(), np.float32(0))
        d, dmin = to_half(top_scale / np.float32(15), block, 80), to_half(top_minimum / np.float32(15), block, 82)
        for g in range(16):
            scale = nearest(np.float32(15) / top_scale * scales[g], 0, 15) if top_scale > 0 else 0
            minimum = nearest(np.float32(15) / top_minimum * minimums[g], 0, 15) if top_minimum > 0 else 0
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


Q2_K = BlockFormat("q2_k", 256, 84, "q8", 16, 0, 3, _codes, _scales, _encode)
