"""The format Q4_K: 256 weights in 144 bytes, codes of 4 bits, scales and minimums of 6. Knows its blocks."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat
from fiddler.kernels.formats.k_scales import encode_scales, k_scales
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q4_K"]


def _codes(block: Block, group: int) -> ir.Value:
    both, b = block.vector(16 + group // 2 * 32, 32), block.b
    if group % 2:
        return b.lshr(both, block.constant(4, both))
    return b.and_(both, block.constant(15, both))


def _pair(block: Block, i: int) -> ir.Value:
    both = block.twice(16 + 32 * i)
    return block.b.and_(block.shifted(both, (0, -4)), block.constant(15, both))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    codes = np.empty(256, np.uint8)
    for i in range(values.size // 256):
        block = out[144 * i : 144 * i + 144]
        own = weights[256 * i : 256 * i + 256]
        encode_scales(values[256 * i : 256 * i + 256], own, 15, (-1.0, 0.1, 20), block, codes)
        for j in range(128):
            low = j // 32 * 64 + j % 32
            block[16 + j] = codes[low] | codes[low + 32] << 4


Q4_K = BlockFormat("q4_k", 256, 144, "q8", 32, 0, 15, _codes, k_scales, _encode, Weighting(2.0), _pair)
