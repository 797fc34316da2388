"""bfloat16, float16 and float32 as arrays: one rounding each way, and counts of what it lost. Knows no files.

bfloat16 is the upper half of a float32 and travels as uint16 bits, for numpy has no such type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lost", "to_bits", "to_float32"]


@dataclass(frozen=True)
class Lost:
    """What a narrowing cost: finite values that became infinite, and others than zero that became zero."""

    overflowed: int = 0
    flushed: int = 0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.overflowed + other.overflowed, self.flushed + other.flushed)


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Widen float16 or bfloat16 bits (uint16), exactly; float32 comes back as it is. Any shape."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bits(values: NDArray[Any], dtype: Literal["bf16", "f16"]) -> tuple[NDArray[np.uint16], Lost]:
    """The bits of `values` (float32, float16 or bfloat16 bits) in `dtype`, shape kept, and what that lost.

    Rounds to nearest, ties to even (IEEE 754). Where the type stays the same, so does every bit,
    payloads of NaNs included; otherwise a NaN stays a NaN.
    """
    if values.dtype == (np.uint16 if dtype == "bf16" else np.float16):
        return values.view(np.uint16), Lost()
    wide = to_float32(values)
    bits = _bfloat16(wide) if dtype == "bf16" else _float16(wide)
    return bits, _lost(wide, bits, 0x7F80 if dtype == "bf16" else 0x7C00)


def _bfloat16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(wide).view(np.uint32)
    # Just under half of the last kept bit, or half where that bit is odd, carries exactly when rounding up is
    # due, into the exponent where need be. A NaN could carry past the exponent: it is cut, and kept one.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    narrow = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        narrow[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return narrow


def _float16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return wide.astype(np.float16).view(np.uint16)


def _lost(wide: NDArray[np.float32], narrow: NDArray[np.uint16], infinity: int) -> Lost:
    magnitude = narrow & np.uint16(0x7FFF)
    infinite, zero = magnitude == np.uint16(infinity), magnitude == np.uint16(0)
    # Both are rare, so only where the result looks lost is the source looked at.
    overflowed = int(np.count_nonzero(np.isfinite(wide[infinite]))) if infinite.any() else 0
    flushed = int(np.count_nonzero(wide[zero])) if zero.any() else 0
    return Lost(overflowed, flushed)
