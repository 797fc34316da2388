"""Scalar float32 arithmetic without calls or branches, so that LLVM vectorises loops over it.

Compiles to the same on every CPU, with or without instructions for binary16. Knows no arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fiddler.kernels.codegen.jit import OPTIONS

__all__ = ["exponential", "from_half", "silu", "to_half"]


@intrinsic
def _float_of(_context: Any, bits: Any) -> Any:
    """uint32 bits -> the float32 with these bits."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def _bits_of(_context: Any, value: Any) -> Any:
    """float32 -> its bits, uint32."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(**OPTIONS, inline="always")
def exponential(value: np.float32) -> np.float32:
    """exp(value), with value clamped to -87..88; NaN may give the result of any value in that range.

    exp(y) = 2**n * exp(r) with |r| <= ln(2)/2, exp(r) by its Taylor polynomial of degree 7.
    """
    y = min(max(value, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = y - n * np.float32(0.693359375)  # ln(2), in two parts
    r = r + n * np.float32(2.12194440e-4)
    p = r * np.float32(1 / 5040) + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return np.float32(p * _float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)))


@njit(**OPTIONS, inline="always")
def silu(value: np.float32) -> np.float32:
    """value * sigmoid(value)."""
    return np.float32(value / (np.float32(1.0) + exponential(np.float32(-value))))


@njit(**OPTIONS)
def from_half(bits: np.uint16) -> np.float32:
    """The value of binary16 bits, exactly: exponent and mantissa are shifted, then scaled by 2**112."""
    word = np.uint32(bits)
    magnitude = _float_of(np.uint32((word & np.uint32(0x7FFF)) << np.uint32(13))) * np.float32(2.0**112)
    special = np.uint32(0x7F800000) if (word & np.uint32(0x7FFF)) >= np.uint32(0x7C00) else np.uint32(0)
    sign = np.uint32((word & np.uint32(0x8000)) << np.uint32(16))
    value: np.float32 = _float_of(np.uint32(_bits_of(np.float32(magnitude)) | special | sign))
    return value


@njit(**OPTIONS)
def to_half(value: np.float32) -> np.uint16:
    """The bits of the nearest binary16, ties to even; infinity beyond its range; NaN stays NaN."""
    bits = _bits_of(value)
    sign, magnitude = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000)), np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
    half = np.uint32((magnitude + np.uint32(0xFFF) + odd - np.uint32(0x38000000)) >> np.uint32(13))
    # the last bit of float32 0.5 is binary16's smallest step: adding 0.5 rounds to a multiple of that step
    small = np.uint32(_bits_of(np.float32(_float_of(magnitude) + np.float32(0.5))) - np.uint32(0x3F000000))
    half = small if magnitude < np.uint32(0x38800000) else half
    half = np.uint32(0x7C00) if magnitude >= np.uint32(0x477FF000) else half
    half = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else half
    return np.uint16(sign | half)
