"""Copies to a device that compiled code starts by calling C functions. Knows addresses; not what lies there."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fiddler.kernels.codegen.jit import kernel

__all__ = ["call_copy", "call_write", "copy", "copy_columns", "rows_copy_words"]

# of CUDA_MEMCPY2D, in words of 8 bytes: srcHost, srcPitch, dstDevice, dstPitch, WidthInBytes, Height
_SOURCE, _PITCH, _TARGET, _TARGET_PITCH, _ROW_BYTES, _ROWS = 3, 6, 11, 13, 14, 15
_WORDS = 16
_SOURCE_TYPE, _TARGET_TYPE = 4, 18  # in words of 4 bytes
_HOST, _DEVICE = 1, 2  # CUmemorytype


def rows_copy_words() -> np.ndarray:
    """A CUDA_MEMCPY2D from the host to the device for `copy_columns`, which fills it: int64 [16]."""
    words = np.zeros(_WORDS, np.int64)
    words.view(np.int32)[[_SOURCE_TYPE, _TARGET_TYPE]] = _HOST, _DEVICE
    return words


def _c_call(*widths: int) -> Any:
    """An intrinsic's signature and code: function(address, ...) calls a C function with integers of these widths."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        kinds = [ir.IntType(width) for width in widths]
        kind = ir.FunctionType(ir.IntType(32), kinds)
        cast = [b.trunc(value, to) if to.width < 64 else value for value, to in zip(arguments[1:], kinds, strict=True)]
        return b.sext(b.call(b.inttoptr(arguments[0], kind.as_pointer()), cast), ir.IntType(64))

    return types.int64(*[types.int64] * (1 + len(widths))), generate


@intrinsic
def call_copy(_context: Any, _function: Any, _target: Any, _source: Any, _nbytes: Any, _stream: Any) -> Any:
    """int function(uint64 target, void *source, size_t nbytes, void *stream)."""
    return _c_call(64, 64, 64, 64)


@intrinsic
def _call_copy_rows(_context: Any, _function: Any, _copy: Any, _stream: Any) -> Any:
    """int function(CUDA_MEMCPY2D *copy, void *stream)."""
    return _c_call(64, 64)


@intrinsic
def call_write(_context: Any, _function: Any, _stream: Any, _address: Any, _value: Any) -> Any:
    """int function(void *stream, uint64 address, uint32 value, unsigned flags), without flags."""

    signature, generate = _c_call(64, 64, 32, 32)
    four = types.int64(*[types.int64] * 4)

    def generate_with_flags(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return generate(context, b, signature, [*arguments, ir.Constant(ir.IntType(64), 0)])

    return four, generate_with_flags


@partial(kernel, parallel=False)
def copy(function: int, target: int, source: int, nbytes: int, stream: int, borders: np.ndarray) -> int:
    """Copy contiguous bytes by a function for `call_copy`, in pieces that cross no border.

    Returns 0, or the first other result of that function.
    """
    end = source + nbytes
    while source < end:
        index, piece_end = np.searchsorted(borders, source, "right"), end
        if index < borders.size:
            piece_end = min(end, borders[index])
        result: int = call_copy(function, target, source, piece_end - source, stream)
        if result != 0:
            return result
        target, source = target + piece_end - source, piece_end
    return 0


@partial(kernel, parallel=False)
def copy_columns(
    functions: tuple[int, int, int],
    target: int,
    source: int,
    row_bytes: int,
    rows: int,
    pitch: int,
    borders: np.ndarray,
    words: np.ndarray,
) -> int:
    """Copy `rows` rows of `row_bytes` bytes, `pitch` bytes apart, in pieces that cross no border; packed there.

    functions: addresses for `call_copy` and for CUDA_MEMCPY2Ds; and the stream. words: of `rows_copy_words`.
    Returns as `copy`.
    """
    one, several, stream = functions
    left = rows
    while left > 0:
        index, count = np.searchsorted(borders, source, "right"), left
        if index < borders.size:
            count = min(left, max(0, (borders[index] - source - row_bytes) // pitch + 1))
        if count > 0:
            words[_SOURCE], words[_PITCH], words[_TARGET] = source, pitch, target
            words[_TARGET_PITCH], words[_ROW_BYTES], words[_ROWS] = row_bytes, row_bytes, count
            result: int = _call_copy_rows(several, words.ctypes.data, stream)
        else:  # a border lies in this row
            count = 1
            result = copy(one, target, source, row_bytes, stream, borders)
        if result != 0:
            return result
        left, source, target = left - count, source + count * pitch, target + count * row_bytes
    return 0
