"""The formats Q5_0 and Q5_1: 32 codes of 5 bits with a float16 scale, and in Q5_1 a minimum. Knows their blocks.

The fifth bits lie together, 32 in a word, before the 16 bytes of the other four.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.llvm import I32
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales, nibbles
from fiddler.kernels.formats.scale_search import encode_range, encode_signed
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["Q5_0", "Q5_1"]


def _scale(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1))


def _scale_and_minimum(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1), block.splat(block.b.fneg(block.half(2)), 1))


def _with_fifth_bits(block: Block, offset: int) -> ir.Value:
    low, b = nibbles(block, offset + 4), block.b
    bits = b.bitcast(block.integer(offset, I32), ir.VectorType(ir.IntType(1), 32))
    sixteen, none = block.constant(16, low), block.constant(0, low)
    return b.or_(low, b.select(bits, sixteen, none))


def _codes(block: Block, _group: int) -> ir.Value:
    return _with_fifth_bits(block, 2)


def _codes_behind_minimum(block: Block, _group: int) -> ir.Value:
    return _with_fifth_bits(block, 4)


@njit(**OPTIONS)
def _store(codes: np.ndarray, block: np.ndarray, offset: int) -> None:
    for j in range(4):
        fifth = 0
        for bit in range(8):
            fifth |= (codes[8 * j + bit] >> 4) << bit
        block[offset + j] = fifth
    for j in range(16):
        block[offset + 4 + j] = codes[j] & 15 | (codes[j + 16] & 15) << 4


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.Q5_0`, in every bit, or with a search by weights."""
    codes = np.empty(32, np.uint8)
    for i in range(values.size // 32):
        block = out[22 * i : 22 * i + 22]
        encode_signed(values[32 * i : 32 * i + 32], weights[32 * i : 32 * i + 32], 16, block, codes)
        _store(codes, block, 2)


@kernel(parallel=False, fastmath=False)
def _encode_range(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.Q5_1`, in every bit, or with a search by weights."""
    codes = np.empty(32, np.uint8)
    for i in range(values.size // 32):
        block = out[24 * i : 24 * i + 24]
        encode_range(values[32 * i : 32 * i + 32], weights[32 * i : 32 * i + 32], 31, block, codes)
        _store(codes, block, 4)


Q5_0 = BlockFormat("q5_0", 32, 22, "q8", 32, 16, 31, _codes, _scale, _encode, Weighting(1.0, whole_row=True))
Q5_1 = BlockFormat(
    "q5_1",
    32,
    24,
    "q8",
    32,
    0,
    31,
    _codes_behind_minimum,
    _scale_and_minimum,
    _encode_range,
    Weighting(1.0, whole_row=True),
)
