"""C functions that queue copies in a stream, for compiled code, which calls them without Python's lock.

Knows addresses; no streams of torch's, nor what is copied.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

__all__ = ["CFunctions", "Copy2D", "host_functions"]


class CFunctions(NamedTuple):
    """Addresses of C functions that queue work in `stream`, and return 0 for success. See the CUDA Driver API."""

    copy: int  # int (uint64 target, void *source, size_t nbytes, void *stream)
    copy_rows: int  # int (CUDA_MEMCPY2D *copy, void *stream)
    write: int  # int (void *stream, uint64 address, uint32 value, unsigned flags): after all copies so far
    stream: int
    borders: tuple[int, ...] = ()  # ascending source addresses that no copy may cross


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("srcXInBytes", ctypes.c_size_t),
        ("srcY", ctypes.c_size_t),
        ("srcMemoryType", ctypes.c_int),
        ("srcHost", ctypes.c_void_p),
        ("srcDevice", ctypes.c_uint64),
        ("srcArray", ctypes.c_void_p),
        ("srcPitch", ctypes.c_size_t),
        ("dstXInBytes", ctypes.c_size_t),
        ("dstY", ctypes.c_size_t),
        ("dstMemoryType", ctypes.c_int),
        ("dstHost", ctypes.c_void_p),
        ("dstDevice", ctypes.c_uint64),
        ("dstArray", ctypes.c_void_p),
        ("dstPitch", ctypes.c_size_t),
        ("WidthInBytes", ctypes.c_size_t),
        ("Height", ctypes.c_size_t),
    ]


def _copy(target: int, source: int, nbytes: int, _stream: int) -> int:
    ctypes.memmove(target, source, nbytes)
    return 0


def _copy_rows(copy: ctypes._Pointer[Copy2D], _stream: int) -> int:
    c = copy.contents
    for row in range(c.Height):
        ctypes.memmove(c.dstDevice + row * c.dstPitch, c.srcHost + row * c.srcPitch, c.WidthInBytes)
    return 0


def _write(_stream: int, address: int, value: int, _flags: int) -> int:
    ctypes.c_uint32.from_address(address).value = value
    return 0


_COPY = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)(_copy)
_COPY_ROWS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Copy2D), ctypes.c_void_p)(_copy_rows)
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint)(_write)


def host_functions() -> CFunctions:
    """Copies from memory to memory, within the call."""
    copy, copy_rows, write = (ctypes.cast(each, ctypes.c_void_p).value or 0 for each in (_COPY, _COPY_ROWS, _WRITE))
    return CFunctions(copy, copy_rows, write, 0)
