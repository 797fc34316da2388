"""Tensors that end where memory ends: whoever reads a byte behind one is stopped by the processor, not by luck."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from fiddler.files.gguf_file import GgufFile

__all__ = ["GuardedFile"]

_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is the last before a page that nobody may touch."""
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    pages = np.frombuffer(memory, np.uint8)
    guard = ctypes.c_void_p(pages.ctypes.data + size)
    if _LIBC.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    pages[size - array.nbytes : size] = array.reshape(-1).view(np.uint8)
    copy = pages[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy.flags.writeable = False
    return copy


class GuardedFile(GgufFile):
    """A file whose tensors are copies of this kind."""

    @classmethod
    def of(cls, file: GgufFile) -> GuardedFile:
        """The tensors of an open file."""
        return cls(
            *(file.path, file.version, file.metadata, file.tensors, file._maps, file._descriptors, file.value_types)
        )

    def array(self, name: str) -> np.ndarray:
        """Implements `GgufFile.array`."""
        return guarded(super().array(name))

    def stored(self, name: str) -> np.ndarray:
        """Implements `GgufFile.stored`."""
        return guarded(super().stored(name))
