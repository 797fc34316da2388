"""C functions that start copies, for compiled code, which calls them without Python's lock. Knows no streams."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

__all__ = ["CFunction", "host_function"]


class CFunction(NamedTuple):
    """A C function that starts a copy of contiguous bytes in a stream.

    int function(uint64 target, void *source, size_t nbytes, void *stream); returns 0 for success.
    """

    address: int
    stream: int
    borders: tuple[int, ...] = ()  # ascending source addresses that no copy may cross


def _copy(target: int, source: int, nbytes: int, _stream: int) -> int:
    ctypes.memmove(target, source, nbytes)
    return 0


_KIND = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_COPY = _KIND(_copy)


def host_function(borders: tuple[int, ...] = ()) -> CFunction:
    """Copies from memory to memory, within the call."""
    return CFunction(ctypes.cast(_COPY, ctypes.c_void_p).value or 0, 0, borders)
