"""The formats Q4_0 and Q4_1: 32 codes of 4 bits with a float16 scale, and in Q4_1 a minimum. Knows their blocks."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales, nibbles
from fiddler.kernels.formats.scale_search import encode_range, encode_signed
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q4_0", "Q4_1"]


def _scale(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1))


def _scale_and_minimum(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1), block.splat(block.b.fneg(block.half(2)), 1))


def _codes(block: Block, _group: int) -> ir.Value:
    return nibbles(block, 2)


def _codes_behind_minimum(block: Block, _group: int) -> ir.Value:
    return nibbles(block, 4)


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.Q4_0`, in every bit, or with a search by weights."""
    codes = np.empty(32, np.uint8)
    for i in range(values.size // 32):
        block = out[18 * i : 18 * i + 18]
        encode_signed(values[32 * i : 32 * i + 32], weights[32 * i : 32 * i + 32], 8, block, codes)
        for j in range(16):
            block[2 + j] = codes[j] | codes[j + 16] << 4


@kernel(parallel=False, fastmath=False)
def _encode_range(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.Q4_1`, in every bit, or with a search by weights."""
    codes = np.empty(32, np.uint8)
    for i in range(values.size // 32):
        block = out[20 * i : 20 * i + 20]
        encode_range(values[32 * i : 32 * i + 32], weights[32 * i : 32 * i + 32], 15, block, codes)
        for j in range(16):
            block[4 + j] = codes[j] | codes[j + 16] << 4


Q4_0 = BlockFormat("q4_0", 32, 18, "q8", 32, 8, 15, _codes, _scale, _encode, Weighting(1.0, whole_row=True))
Q4_1 = BlockFormat(
    "q4_1",
    32,
    20,
    "q8",
    32,
    0,
    15,
    _codes_behind_minimum,
    _scale_and_minimum,
    _encode_range,
    Weighting(1.0, whole_row=True),
)
