"""The format MXFP4: 32 weights in 17 bytes, a power of two and numbers of 4 bits (E2M1). Knows its blocks.

OCP Microscaling Formats (MX) specification 1.0. As in ggml, the table holds twice the numbers, the scale half.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.codegen.llvm import F32, I8, I32
from fiddler.kernels.formats.block_format import Block, BlockFormat, Scales, nibbles
from fiddler.kernels.formats.lookup import looked_up

__all__ = ["MXFP4"]

_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_TABLE = np.array(_VALUES, np.float32)
_UNSIGNED = [value + 12 for value in _VALUES]


def _codes(block: Block, _group: int) -> ir.Value:
    return looked_up(block, nibbles(block, 1), _UNSIGNED)


def _scales(block: Block) -> Scales:
    b, exponent = block.b, block.b.zext(block.integer(0, I8), I32)
    normal = b.shl(b.sub(exponent, ir.Constant(I32, 1)), ir.Constant(I32, 23))
    subnormal = b.shl(ir.Constant(I32, 0x00200000), b.and_(exponent, ir.Constant(I32, 1)))
    small = b.icmp_unsigned("<", exponent, ir.Constant(I32, 2))
    return Scales(block.splat(b.bitcast(b.select(small, subnormal, normal), F32), 1))


@kernel(parallel=False, fastmath=False)
def _encode(values: np.ndarray, _weights: np.ndarray, out: np.ndarray) -> None:
    """As `gguf.quants.MXFP4`: the exponent of the largest magnitude, then for each the nearest number, the first of
    two."""
    codes = np.empty(32, np.uint8)
    for i in range(values.size // 32):
        x, block = values[32 * i : 32 * i + 32], out[17 * i : 17 * i + 17]
        largest = np.float32(0)
        for value in x:
            largest = max(largest, abs(value))
        exponent = 0
        if largest > 0 and largest < np.inf:
            exponent = int(np.floor(np.log2(largest))) - 2 + 127
        exponent = min(max(exponent, 0), 255)
        bits = 0x00200000 << exponent if exponent < 2 else (exponent - 1) << 23
        scale = np.uint32(bits).view(np.float32)
        for j in range(32):
            best, best_error = 0, np.float32(np.inf)
            for code in range(16):
                error = abs(scale * _TABLE[code] - x[j])
                if error < best_error:
                    best, best_error = code, error
            codes[j] = best
        block[0] = exponent
        for j in range(16):
            block[1 + j] = codes[j] | codes[j + 16] << 4


MXFP4 = BlockFormat("mxfp4", 32, 17, "q8", 32, 12, 24, _codes, _scales, _encode)
