"""One safetensors file: its header checked once, its tensors read by rows.

Knows the container (https://huggingface.co/docs/safetensors: an 8-byte little-endian header length, a JSON
header, then the tensors back to back); does not know the tensors' purpose or a model's other shards.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fiddler.converters.json_object import parse_object
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import open_regular

__all__ = ["DTYPES", "FLOATS", "Array", "SafetensorsFile", "StoredTensor"]

Array: TypeAlias = NDArray[Any]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "U8": np.dtype("u1"),
}
"""The types that are read, as numpy dtypes; bfloat16 as uint16 bits: numpy has no such type."""
FLOATS = frozenset(("BF16", "F16", "F32"))
"""Those that convert; U8 are blocks of quantised weights."""

_LARGEST_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2} | {
    "I32": 4, "U32": 4, "F64": 8, "I64": 8, "U64": 8, "F16": 2, "BF16": 2, "F32": 4,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Location of one tensor: `nbytes` bytes at byte `offset` of the file `path`, of a safetensors `dtype`."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """An open file: `tensors` by name, and their `rows`.

    Opening raises CheckpointError if the header is damaged or does not describe exactly the bytes that follow it
    (ranges out of the file, overlaps, gaps, shapes that need another number of bytes).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                size = os.fstat(file.fileno()).st_size
                start, header = _read_header(file.read(8), file.read, size, path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; download the whole checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}; download it again") from None
        self.tensors: dict[str, StoredTensor] = _check_header(header, path, start, size - start)

    @cached_property
    def _descriptor(self) -> int:
        """Of the file, open as long as this object lives."""
        file = open_regular(self.path)
        weakref.finalize(self, file.close)
        with suppress(OSError, AttributeError):  # front to back, once, and maybe larger than memory: a hint
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file.fileno()

    def rows(self, stored: StoredTensor, first: int, count: int) -> Array:
        """Read rows `first` to `first + count` of a tensor viewed as a matrix [rows, last dimension].

        Returns a read-only array [count, last dimension]; bfloat16 as uint16 bits. It is read, not mapped: where a file
        was cut short that is an error, while a mapping would end the process (SIGBUS).
        Raises CheckpointError if the file was cut short meanwhile, or cannot be read.
        """
        dtype, width = DTYPES[stored.dtype], stored.shape[-1]
        begin = stored.offset + first * width * dtype.itemsize
        rows = np.empty((count, width), dtype)
        assert stored.offset <= begin <= begin + rows.nbytes <= stored.offset + stored.nbytes
        buffer, done = rows.view(np.uint8).reshape(-1).data, 0
        while done < len(buffer):
            try:
                read = os.preadv(self._descriptor, [buffer[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if not read:
                raise CheckpointError(f"{self.path} was cut short while in use; download it again")
            done += read
        rows.flags.writeable = False
        return rows


def _read_header(prefix: bytes, read: Any, size: int, path: Path) -> tuple[int, dict[str, object]]:
    """Offset of the data [bytes] and the header; `prefix`: the file's first 8 bytes, `read`: reads the next ones."""
    if prefix == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
    if len(prefix) < 8:
        raise CheckpointError(f"{path} is {size} bytes long, too short for safetensors; download it again")
    length = int.from_bytes(prefix, "little")
    if length > min(size - 8, _LARGEST_HEADER):
        raise CheckpointError(
            f"{path} announces a header of {length} bytes in a file of {size}: not safetensors, or truncated"
        )
    return 8 + length, parse_object(read(length), f"the header of {path}")


def _check_header(header: Mapping[str, object], path: Path, start: int, data_bytes: int) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            tensors[name] = _check_entry(name, entry, path, start)
    end, previous = start, "the header"
    for stored in sorted(tensors.values(), key=lambda stored: (stored.offset, stored.nbytes)):
        if stored.offset != end:
            fault = f"overlaps {previous}" if stored.offset < end else f"leaves a gap behind {previous}"
            raise CheckpointError(f"{path}: tensor {quoted(stored.name)} {fault}; the file is damaged")
        end, previous = stored.offset + stored.nbytes, quoted(stored.name)
    if end != start + data_bytes:
        raise CheckpointError(
            f"{path} is {start + data_bytes} bytes long, but its header describes {end}: "
            "a download that did not finish, or a damaged file"
        )
    return tensors


def _check_entry(name: str, entry: object, path: Path, start: int) -> StoredTensor:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} has the header entry {quoted(entry, 60)}; the file is damaged")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise CheckpointError(f"{where} has the unknown dtype {quoted(dtype, 40)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has shape {quoted(shape, 60)} at {quoted(offsets, 60)}; the file is damaged")
    begin, end = offsets
    if math.prod(shape) * _SIZES[dtype] != end - begin:
        raise CheckpointError(
            f"{where} of shape {quoted(shape, 60)} and dtype {dtype} cannot have {end - begin} bytes; "
            "the file is damaged"
        )
    return StoredTensor(name, path, dtype, tuple(shape), start + begin, end - begin)


def _naturals(value: object) -> bool:
    """Whether `value` is, as shapes and offsets are, a list of at most 8 integers from 0 that fit a file offset."""
    if not isinstance(value, list) or len(value) > 8:
        return False
    return all(type(item) is int and 0 <= item < 1 << 62 for item in value)  # True is an instance of int, too
