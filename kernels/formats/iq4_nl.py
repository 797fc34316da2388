"""The formats IQ4_NL and IQ4_XS: codes of 4 bits that stand for uneven steps. Knows their blocks and their table.

IQ4_NL is 32 weights in 18 bytes; IQ4_XS 256 in 136, with a scale of 6 bits for each 32.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS, kernel
from fiddler.kernels.codegen.llvm import I16, I32
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales, nibbles
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.lookup import looked_up, nearest_entry
from fiddler.kernels.formats.rounding import nearest
from fiddler.kernels.formats.weighting import Weighting

__all__ = ["IQ4_NL", "IQ4_XS"]

_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # `gguf.quants.IQ4_NL.kvalues`
_TABLE = np.array(_VALUES, np.float32)
_UNSIGNED = [value + 128 for value in _VALUES]
_CANDIDATES = 7  # scales to either side of the first that the search tries, as ggml's


def _codes(block: Block, _group: int) -> ir.Value:
    return looked_up(block, nibbles(block, 2), _UNSIGNED)


def _scale(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1))


def _codes_of_eight(block: Block, group: int) -> ir.Value:
    return looked_up(block, nibbles(block, 8 + 16 * group), _UNSIGNED)


def _eight_scales(block: Block) -> Scales:
    b = block.b
    low, upper = block.splat(block.integer(4, I32), 8), block.splat(block.integer(2, I16), 8)
    low = b.and_(b.lshr(low, block.constant([4 * i for i in range(8)], low)), block.constant(15, low))
    upper = b.and_(b.lshr(upper, block.constant([2 * i for i in range(8)], upper)), block.constant(3, upper))
    scales = b.or_(low, b.shl(b.zext(upper, low.type), block.constant(4, low)))
    return Scales(block.times(block.half(0), b.sub(scales, block.constant(32, scales)), signed=True))


@njit(**OPTIONS)
def _search(x: np.ndarray, weights: np.ndarray) -> np.float32:
    """The scale with the least weighted error of several candidates, each refined by least squares.

    weights: of the values' errors; none for their squares.
    """
    extreme = np.float32(0)
    for value in x:
        if abs(value) > abs(extreme):
            extreme = value
    if not abs(extreme) >= np.float32(1e-15):
        return np.float32(0)
    best_scale, best = np.float32(0), np.float32(0)
    for candidate in range(-_CANDIDATES - 1, _CANDIDATES + 1):
        first = candidate < -_CANDIDATES
        inverse = np.float32(-_VALUES[0] if first else _VALUES[0] + candidate) / extreme
        sum_xq, sum_q2 = np.float32(0), np.float32(0)
        for j in range(x.size):
            q, weight = _TABLE[nearest_entry(_TABLE, inverse * x[j])], weights[j] if weights.size else x[j] * x[j]
            sum_xq += weight * q * x[j]
            sum_q2 += weight * q * q
        if sum_q2 > 0 and (first or sum_xq * sum_xq > best * sum_q2):
            best_scale = sum_xq / sum_q2
            best = best_scale * sum_xq
    return best_scale


@njit(**OPTIONS)
def _store(x: np.ndarray, step: np.float32, block: np.ndarray, offset: int) -> None:
    inverse = np.float32(1) / step if step != 0 else np.float32(0)
    for j in range(16):
        low, high = nearest_entry(_TABLE, inverse * x[j]), nearest_entry(_TABLE, inverse * x[j + 16])
        block[offset + j] = low | high << 4


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    for i in range(values.size // 32):
        x, block = values[32 * i : 32 * i + 32], out[18 * i : 18 * i + 18]
        scale = _search(x, weights[32 * i : 32 * i + 32])
        to_half(scale, block, 0)
        _store(x, scale, block, 2)


@kernel(parallel=False, fastmath=False)
def _encode_eight(values: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    scales = np.empty(8, np.float32)
    for i in range(values.size // 256):
        x, block = values[256 * i : 256 * i + 256], out[136 * i : 136 * i + 136]
        extreme = np.float32(0)
        for g in range(8):
            begin = 256 * i + 32 * g
            scales[g] = _search(x[32 * g : 32 * g + 32], weights[begin : begin + 32])
            if abs(scales[g]) > abs(extreme):
                extreme = scales[g]
        d = extreme / np.float32(-32)
        to_half(d, block, 0)
        block[2:8] = 0
        for g in range(8):
            scale = nearest(scales[g] / d, -32, 31) if d != 0 else 0
            block[4 + g // 2] |= ((scale + 32) & 15) << 4 * (g % 2)
            block[2 + g // 4] |= (scale + 32) >> 4 << 2 * (g % 4)
            _store(x[32 * g : 32 * g + 32], d * np.float32(scale), block, 8 + 16 * g)


IQ4_NL = BlockFormat("iq4_nl", 32, 18, "q8", 32, 128, 241, _codes, _scale, _encode, Weighting(2.0))
IQ4_XS = BlockFormat(
    "iq4_xs", 256, 136, "q8", 32, 128, 241, _codes_of_eight, _eight_scales, _encode_eight, Weighting(2.0)
)
