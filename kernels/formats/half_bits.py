"""float32 to float16 bits and back in compiled code, by integers; Numba has no float16. Knows nothing of formats."""

from __future__ import annotations

import numpy as np
from numba import njit

from fiddler.kernels.codegen.jit import OPTIONS

__all__ = ["from_half", "to_half"]


@njit(**OPTIONS)
def to_half(value: np.float32, out: np.ndarray, offset: int) -> np.float32:
    """Write a float32 as float16, rounded to nearest, ties to even, to bytes `offset` and the next; returns it.

    A NaN stays a NaN; what is too large becomes infinity.
    """
    bits = np.float32(value).view(np.uint32)
    sign, magnitude = (bits >> 16) & 0x8000, np.int64(bits & 0x7FFFFFFF)
    if magnitude > 0x7F800000:
        half = np.int64(0x7E00)
    elif magnitude >= 0x47800000:  # 65536
        half = np.int64(0x7C00)
    elif magnitude >= 0x38800000:  # 2**-14
        half = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    else:  # a multiple of 2**-24; that product is exact
        half = np.int64(np.rint(abs(np.float64(value)) * 16777216.0))
    half |= np.int64(sign)
    out[offset], out[offset + 1] = half & 255, half >> 8
    rounded: np.float32 = from_half(half)
    return rounded


@njit(**OPTIONS)
def from_half(half: int) -> np.float32:
    """float16 bits as float32."""
    sign, exponent, fraction = half & 0x8000, (half >> 10) & 31, half & 0x3FF
    if exponent == 31:
        value = np.float32(np.nan) if fraction else np.float32(np.inf)
    elif exponent == 0:
        value = np.float32(fraction) * np.float32(2.0**-24)
    else:
        value = np.uint32(((exponent + 112) << 23) | (fraction << 13)).view(np.float32)
    return -value if sign else value
