"""One position's keys or values of one head in the KV cache: float32, the bits of float16, or blocks of Q8_0.

Compiled code reads and writes such rows; Python asks how long they are. Knows no pools.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numba import types
from numba.extending import overload

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.scalar_math import from_half, to_half
from fiddler.kernels.formats.q8_0 import Q8_0

__all__ = ["head_dim_of", "read_row", "row_length", "write_row"]

_BLOCK, _BYTES = Q8_0.block_length, Q8_0.block_bytes


def row_length(dtype: np.dtype, head_dim: int) -> int:
    """Elements of a row of `head_dim` numbers; raises ValueError for a type that is none, or no whole blocks of Q8_0.

    dtype: float32, uint16 (bits of float16) or uint8 (bytes of blocks of Q8_0).
    """
    if dtype not in (np.float32, np.uint16, np.uint8):
        raise ValueError(f"keys and values are {dtype}; expected float32, bits of float16 or blocks of Q8_0")
    return Q8_0.row_bytes(head_dim) if dtype == np.uint8 else head_dim


def head_dim_of(dtype: np.dtype) -> int:
    """The least `head_dim` of this type that attention takes."""
    return _BLOCK if dtype == np.uint8 else 2


def read_row(stored: np.ndarray, row: np.ndarray) -> None:
    """row = stored, as float32."""
    raise NotImplementedError("called from compiled code only")


def write_row(stored: np.ndarray, row: np.ndarray) -> None:
    """stored = row, in the KV cache's type; blocks of Q8_0 as `gguf.quants.Q8_0` makes them, in every bit."""
    raise NotImplementedError("called from compiled code only")


@overload(read_row, jit_options=OPTIONS)
def _read_of(stored: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    kind = cast(Any, stored).dtype
    if kind == types.float32:

        def read(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = stored[i]
    elif kind == types.uint16:

        def read(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = from_half(stored[i])
    else:

        def read(stored: np.ndarray, row: np.ndarray) -> None:
            for block in range(row.size // _BLOCK):
                begin = _BYTES * block
                scale = from_half(np.uint16(stored[begin]) | np.uint16(stored[begin + 1]) << 8)
                for j in range(_BLOCK):
                    row[_BLOCK * block + j] = scale * np.float32(np.int8(stored[begin + 2 + j]))

    return read


@overload(write_row, jit_options=OPTIONS)
def _write_of(stored: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    kind = cast(Any, stored).dtype
    if kind == types.float32:

        def write(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                stored[i] = row[i]
    elif kind == types.uint16:

        def write(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                stored[i] = to_half(row[i])
    else:

        def write(stored: np.ndarray, row: np.ndarray) -> None:
            for block in range(row.size // _BLOCK):
                x, begin = row[_BLOCK * block : _BLOCK * (block + 1)], _BYTES * block
                largest = np.float32(0)
                for value in x:
                    if abs(value) > largest or np.isnan(value):
                        largest = abs(value)
                scale = largest / np.float32(127)
                inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
                bits = to_half(scale)
                stored[begin], stored[begin + 1] = bits & 255, bits >> 8
                for j in range(_BLOCK):
                    magnitude = np.floor(abs(x[j] * inverse))
                    magnitude += np.floor(np.float32(2) * (abs(x[j] * inverse) - magnitude))  # half away from zero
                    stored[begin + 2 + j] = np.uint8(np.int32(magnitude if x[j] > 0 else -magnitude) & 255)

    return write
