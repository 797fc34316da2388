"""The format Q5_K: 256 weights in 176 bytes, codes of 5 bits, scales and minimums of 6. Knows its blocks."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat
from fiddler.kernels.formats.k_scales import encode_scales, k_scales
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q5_K"]


def _codes(block: Block, group: int) -> ir.Value:
    both, fifth, b = block.vector(48 + group // 2 * 32, 32), block.vector(16, 32), block.b
    bit = b.and_(fifth, block.constant((1 << group) - (256 if group == 7 else 0), fifth))
    if group < 4:
        bit = b.shl(bit, block.constant(4 - group, bit))
    elif group > 4:
        bit = b.lshr(bit, block.constant(group - 4, bit))
    low = b.lshr(both, block.constant(4, both)) if group % 2 else b.and_(both, block.constant(15, both))
    return b.or_(low, bit)


def _pair(block: Block, i: int) -> ir.Value:
    both, fifth, b = block.twice(48 + 32 * i), block.twice(16), block.b
    bit = b.and_(block.shifted(fifth, (4 - 2 * i, 3 - 2 * i)), block.constant(16, fifth))
    return b.or_(b.and_(block.shifted(both, (0, -4)), block.constant(15, both)), bit)


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    codes = np.empty(256, np.uint8)
    for i in range(values.size // 256):
        block = out[176 * i : 176 * i + 176]
        own = weights[256 * i : 256 * i + 256]
        encode_scales(values[256 * i : 256 * i + 256], own, 31, (-0.5, 0.1, 15), block, codes)
        for j in range(32):
            fifth = 0
            for group in range(8):
                fifth |= codes[32 * group + j] >> 4 << group
            block[16 + j] = fifth
        for j in range(128):
            low = j // 32 * 64 + j % 32
            block[48 + j] = codes[low] & 15 | (codes[low + 32] & 15) << 4


Q5_K = BlockFormat("q5_k", 256, 176, "q8", 32, 0, 31, _codes, k_scales, _encode, Weighting(2.0), _pair)
