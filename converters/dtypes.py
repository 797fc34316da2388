"""Converts arrays of bfloat16, float16 and float32 with one rounding, and counts what that loses. Knows no files.

bfloat16 is the upper half of a float32; arrays hold it as uint16 bits: numpy has no such type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["RangeLoss", "loss_warnings", "to_bits", "to_float32"]


@dataclass(frozen=True)
class RangeLoss:
    """Counts of a narrowing: finite values that became infinite, non-zero values that became zero, NaNs as before.

    rounded: all finite values that changed, those two kinds among them.
    """

    overflowed: int = 0
    flushed: int = 0
    nans: int = 0
    rounded: int = 0

    def __add__(self, other: RangeLoss) -> RangeLoss:
        return RangeLoss(
            self.overflowed + other.overflowed,
            self.flushed + other.flushed,
            self.nans + other.nans,
            self.rounded + other.rounded,
        )


def loss_warnings(loss: RangeLoss, dtype: Literal["bf16", "f16"]) -> tuple[str, ...]:
    """Lines for the user about what a conversion to `dtype` lost."""
    lines = []
    rounded = loss.rounded - loss.overflowed - loss.flushed  # those two kinds have lines of their own
    if rounded:
        lines.append(f"{rounded} weights of the source have no exact value in {dtype}; they were rounded")
    if loss.overflowed:
        remedy = "; convert with dtype bf16" if dtype == "f16" else ""
        lines.append(f"{loss.overflowed} weights are too large for {dtype} and became infinite{remedy}")
    if loss.nans:
        lines.append(f"{loss.nans} weights are NaN, as in the checkpoint: the model will not run; download it again")
    if loss.flushed:
        lines.append(f"{loss.flushed} weights are too small for {dtype} and became zero")
    return tuple(lines)


def to_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Widen float16 or bfloat16 bits (uint16), exactly; float32 comes back as it is. Any shape."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


def to_bits(values: NDArray[Any], dtype: Literal["bf16", "f16"]) -> tuple[NDArray[np.uint16], RangeLoss]:
    """The bits of `values` (float32, float16 or bfloat16 bits) in `dtype`, of the same shape, and the range loss.

    Rounds to nearest, ties to even (IEEE 754). If the type is the same, no bit changes, not even in the payload of
    a NaN; otherwise a NaN stays a NaN.
    """
    infinity = 0x7F80 if dtype == "bf16" else 0x7C00
    if values.dtype == (np.uint16 if dtype == "bf16" else np.float16):
        bits = values.view(np.uint16)
        return bits, RangeLoss(nans=_count_nans(bits, infinity))
    wide = to_float32(values)
    bits = _bfloat16(wide) if dtype == "bf16" else _float16(wide)
    return bits, _range_loss(wide, bits, infinity)


def _bfloat16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(wide).view(np.uint32)
    # Add just under half a unit of the last upper bit, or half a unit if that bit is odd: this carries exactly when
    # rounding up is due, into the exponent if need be. A NaN could carry past the exponent: cut it, set its quiet bit.
    rounded = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    narrow = (rounded >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(wide)
    if nan.any():
        narrow[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return narrow


def _float16(wide: NDArray[np.float32]) -> NDArray[np.uint16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return wide.astype(np.float16).view(np.uint16)


def _range_loss(wide: NDArray[np.float32], narrow: NDArray[np.uint16], infinity: int) -> RangeLoss:
    wide, narrow = np.ascontiguousarray(wide).reshape(-1), narrow.reshape(-1)
    magnitude = narrow & np.uint16(0x7FFF)
    infinite, zero = magnitude >= np.uint16(infinity), magnitude == np.uint16(0)
    # Both are rare: look at the source only where the result is infinite, NaN or zero.
    ends = wide[infinite] if infinite.any() else wide[:0]
    overflowed, nans = int(np.count_nonzero(np.isfinite(ends))), int(np.count_nonzero(np.isnan(ends)))
    flushed = int(np.count_nonzero(wide[zero])) if zero.any() else 0
    low = wide.view(np.uint32).astype(np.uint16)  # half of the fraction
    if infinity == 0x7F80:
        changed = low != 0
    else:
        changed = low << np.uint16(3) != 0
        # Values below 2**-14 are multiples of 2**-24: one whose lowest 13 bits are zero may change as well.
        few = (magnitude < np.uint16(0x400)) & ~changed
        if few.any():
            with np.errstate(over="ignore", invalid="ignore"):
                multiple = wide * np.float32(1 << 24)
            changed |= few & (np.rint(multiple) != multiple)
    rounded = int(np.count_nonzero(changed))
    if len(ends):  # infinities and NaNs are the same as before
        rounded += overflowed - int(np.count_nonzero(changed[infinite]))
    return RangeLoss(overflowed, flushed, nans, rounded)


def _count_nans(bits: NDArray[np.uint16], infinity: int) -> int:
    return int(np.count_nonzero((bits & np.uint16(0x7FFF)) > np.uint16(infinity)))
