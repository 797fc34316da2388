"""The format Q8_0: 32 weights in 34 bytes, a float16 scale and int8 codes. Knows its blocks; no matrices."""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales
from fiddler.kernels.formats.half_bits import to_half

__all__ = ["Q8_0"]


def _codes(block: Block, _group: int) -> ir.Value:
    signed = block.vector(2, 32)
    return block.b.xor(signed, block.constant(-128, signed))


def _scales(block: Block) -> Scales:
    return Scales(block.splat(block.half(0), 1))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, _weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.Q8_0`, in every bit."""
    for i in range(values.size // 32):
        x, block = values[32 * i : 32 * i + 32], out[34 * i : 34 * i + 34]
        largest = np.float32(0)
        for value in x:
            if abs(value) > largest or np.isnan(value):
                largest = abs(value)
        d = largest / np.float32(127)
        inverse = np.float32(1) / d if d != 0 else np.float32(0)
        to_half(d, block, 0)
        for j in range(32):
            scaled = x[j] * inverse
            magnitude = np.floor(abs(scaled))
            magnitude += np.floor(np.float32(2) * (abs(scaled) - magnitude))  # half away from zero
            block[2 + j] = np.uint8(np.int32(magnitude if scaled > 0 else -magnitude) & 255)


Q8_0 = BlockFormat("q8_0", 32, 34, "q8", 32, 128, 255, _codes, _scales, _encode)
