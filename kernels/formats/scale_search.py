"""Scale, minimum and codes of blocks of 32 values: Q4_0 to Q5_1, by weights or without. Knows where scales lie."""

from __future__ import annotations

import numpy as np
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.formats.half_bits import to_half
from fiddler.kernels.formats.rounding import nearest, range_codes, search_range, search_signed, signed_codes

__all__ = ["encode_range", "encode_signed"]


@njit(**OPTIONS)
def encode_signed(x: np.ndarray, weights: np.ndarray, half: int, block: np.ndarray, codes: np.ndarray) -> None:
    """Write a block's scale, float16 at 0, and each value's code, 0 to 2 * half - 1, of which `half` stands for 0.

    weights: of the values' errors, or none: then as `signed_codes`.
    """
    if not weights.size:
        to_half(signed_codes(x, half, codes), block, 0)
        return
    d = to_half(search_signed(x, weights, half), block, 0)
    for j in range(x.size):
        codes[j] = nearest(x[j] / d, -half, half - 1) + half if d != 0 else half


@njit(**OPTIONS)
def encode_range(x: np.ndarray, weights: np.ndarray, largest: int, block: np.ndarray, codes: np.ndarray) -> None:
    """Write a block's scale and least value, float16 at 0 and 2, and each value's code, 0 to `largest`.

    weights: of the values' errors, or none: then as `range_codes`.
    """
    if not weights.size:
        d, least = range_codes(x, largest, codes)
        to_half(d, block, 0)
        to_half(least, block, 2)
        return
    work = np.empty(x.size, np.float32)
    scale, minimum = search_range(x, weights, largest, (-0.9, 0.05, 36), False, work)
    d, least = to_half(scale, block, 0), to_half(-minimum, block, 2)
    for j in range(x.size):
        codes[j] = nearest((x[j] - least) / d, 0, largest) if d != 0 else 0
