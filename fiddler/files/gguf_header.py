"""The header of a GGUF file: one walk over its bytes, front to back, in which nothing that it says is trusted.

Every length and offset is held against the file's size before anything is allocated or viewed, since an access
past the end of a mapping kills the process; and there are limits, far above what any model needs, on what a header
may make us allocate and how long that may take. It knows the container's format
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); not files, and not what the metadata means.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass

import numpy as np

from fiddler.errors import FileFormatError

__all__ = ["ARRAY", "BOOL", "MAGIC", "SCALARS", "STRING", "VERSIONS", "VIEWED", "Header", "TensorInfo", "printable"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS: dict[int, tuple[str, int]] = {  # GGUF value type -> (struct code, bytes)
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    BOOL: ("<B", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
VIEWED = {0: ("F32", "<f4"), 1: ("F16", "<u2"), 30: ("BF16", "<u2")}  # ggml type -> name, dtype of the view

_LARGEST_HEADER = (
    1 << 26
)  # bytes; the largest vocabularies, 2**18 tokens and twice as many merges, need a third of that
_MOST_PAIRS = 1 << 16
_MOST_TENSORS = 1 << 17
_MOST_STRINGS = 1 << 20  # in all arrays together; those vocabularies have three quarters of that
_MOST_DIMS = 4  # GGML_MAX_DIMS
_LONGEST_NAME = 64  # GGML_MAX_NAME
_LARGEST_ALIGNMENT = 1 << 20
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` has the slowest dimension first, as in numpy; GGUF stores the reverse."""

    name: str
    shape: tuple[int, ...]
    type: str  # ggml's name: "F32", "F16", "BF16", "Q4_K", ...
    nbytes: int
    offset: int  # bytes from the start of its file
    part: int  # which file of a split model, from 0


@dataclass(frozen=True)
class Header:
    """What one file says; no two of its tensors overlap."""

    version: int
    metadata: dict[str, object]  # str, int, float, bool, list[str] and 1-D numpy arrays
    tensors: list[TensorInfo]

    @classmethod
    def parse(cls, data: mmap.mmap | bytes, part: int = 0) -> Header:
        """Walk over `data`, a whole file; `part` is passed on to the tensors.

        Raises FileFormatError, in one printable line that does not name the file.
        """
        return _Walk(data).header(part)


def printable(value: object, most: int = 60) -> str:
    """A value from a file for a message or a terminal: one line, at most about `most` characters, no control codes."""
    text = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else str(value)
    if len(text) > most:
        text = text[:most] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Walk:
    def __init__(self, data: mmap.mmap | bytes) -> None:
        self._data = data
        self._size = len(data)
        self._end = min(self._size, _LARGEST_HEADER)
        self._at = 0
        self._strings_left = _MOST_STRINGS

    def header(self, part: int) -> Header:
        magic = self._data[: len(MAGIC)]
        if magic != MAGIC:
            raise FileFormatError(
                f"starts with {magic!r}, not {MAGIC!r}; give a GGUF file, or convert a Hugging Face folder with "
                "`fiddler convert`"
            )
        self._at = len(MAGIC)
        version = self._integer("<I", 4, "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in VERSIONS else f"version {version}"
            raise FileFormatError(f"is a {kind} GGUF; little-endian version 2 or 3 is read: convert the model again")
        tensor_count = self._integer("<Q", 8, "tensor count")
        pair_count = self._integer("<Q", 8, "metadata count")
        self._fits(tensor_count, 32, _MOST_TENSORS, "tensors")
        self._fits(pair_count, 13, _MOST_PAIRS, "metadata pairs")
        metadata: dict[str, object] = {}
        for _ in range(pair_count):
            key = self._string("a metadata key")
            what = f"metadata key '{printable(key)}'"
            if key in metadata:
                raise FileFormatError(f"{what} appears twice")
            metadata[key] = self._value(self._integer("<I", 4, what), what)
        alignment = _alignment(metadata)
        entries = [self._entry() for _ in range(tensor_count)]
        data = -(-self._at // alignment) * alignment
        tensors = [_located(*entry, data, alignment, self._size, part) for entry in entries]
        _check_apart(tensors)
        return Header(version, metadata, tensors)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor's name, shape, type and offset into the data."""
        name = self._string("a tensor name")
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise FileFormatError(f"tensor name '{printable(name)}' is not 1 to {_LONGEST_NAME} printable characters")
        what = f"tensor {name}"
        dims = self._integer("<I", 4, what)
        if not 1 <= dims <= _MOST_DIMS:
            raise FileFormatError(f"{what} has {dims} dimensions; 1 to {_MOST_DIMS} are possible")
        shape = tuple([self._integer("<Q", 8, what) for _ in range(dims)])[::-1]
        if min(shape) < 1 or math.prod(shape) >= 1 << 62:
            raise FileFormatError(f"{what} has the impossible shape {shape}")
        return name, shape, self._integer("<I", 4, what), self._integer("<Q", 8, what)

    def _value(self, kind: int, what: str) -> object:
        if kind == STRING:
            return self._string(what)
        if kind == ARRAY:
            return self._array(what)
        if kind not in SCALARS:
            raise FileFormatError(f"{what} has the unknown type {kind}")
        code, width = SCALARS[kind]
        self._skip(width, what)
        value = struct.unpack_from(code, self._data, self._at - width)[0]
        return self._bool(value, what) if kind == BOOL else value

    def _array(self, what: str) -> list[str] | np.ndarray:
        kind = self._integer("<I", 4, what)
        count = self._integer("<Q", 8, what)
        if kind == STRING:
            self._fits(count, 8, self._strings_left, f"strings in {what}")
            self._strings_left -= count
            return [self._string(what) for _ in range(count)]
        if kind not in SCALARS:
            raise FileFormatError(f"{what} is an array of the unsupported type {kind}")
        code, width = SCALARS[kind]
        self._fits(count, width, _LARGEST_HEADER, f"values in {what}")
        values = np.frombuffer(self._data, code, count, self._at).copy()
        self._at += count * width
        if kind == BOOL:
            self._bool(int(values.max(initial=0)), what)
            return values.astype(np.bool_)
        return values

    @staticmethod
    def _bool(value: int, what: str) -> bool:
        if value > 1:
            raise FileFormatError(f"{what} is a bool of value {value}; it must be 0 or 1")
        return value == 1

    def _string(self, what: str) -> str:
        at = self._at + 8
        if at > self._end:
            self._ended(what)
        (length,) = _U64.unpack_from(self._data, at - 8)
        end = at + length
        if end > self._end:
            raise FileFormatError(
                f"{what}: the string at byte {at} says it is {length} bytes long, past the end of the "
                + ("file" if end > self._size else f"largest header of {self._end} bytes")
            )
        self._at = end
        try:
            return self._data[at:end].decode("utf-8")
        except UnicodeDecodeError:
            raise FileFormatError(f"{what}: the string at byte {at} is not UTF-8; convert the model again") from None

    def _integer(self, code: str, width: int, what: str) -> int:
        self._skip(width, what)
        value: int = struct.unpack_from(code, self._data, self._at - width)[0]
        return value

    def _skip(self, width: int, what: str) -> None:
        if self._at + width > self._end:
            self._ended(what)
        self._at += width

    def _fits(self, count: int, least_bytes: int, most: int, what: str) -> None:
        if count > (self._size - self._at) // least_bytes:
            raise FileFormatError(f"says it has {count} {what}, more than its {self._size} bytes can hold")
        if count > most or count > (self._end - self._at) // least_bytes:
            raise FileFormatError(f"says it has {count} {what}, far more than any model needs; convert the model again")

    def _ended(self, what: str) -> None:
        if self._end < self._size:
            raise FileFormatError(f"has a header of more than {self._end} bytes; convert the model again")
        raise FileFormatError(f"ends at byte {self._size}, inside {what}: truncated; download or convert it again")


def _alignment(metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is int and 8 <= value <= _LARGEST_ALIGNMENT and not value & (value - 1):  # type: True is an int
        return value
    shown = printable(value)
    raise FileFormatError(f"general.alignment is '{shown}'; it must be a power of two from 8 to {_LARGEST_ALIGNMENT}")


def _located(
    name: str, shape: tuple[int, ...], kind: int, offset: int, data: int, alignment: int, size: int, part: int
) -> TensorInfo:
    """A tensor that lies, whole and aligned, between `data`, where tensors begin, and `size`, where the file ends."""
    type_name, block, block_bytes = _ggml_type(name, kind)
    if shape[-1] % block:
        raise FileFormatError(f"tensor {name}: rows of {shape[-1]} are not whole blocks of {block} {type_name}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset % alignment:
        raise FileFormatError(f"tensor {name}: offset {offset} is not a multiple of the alignment {alignment}")
    if data + offset + nbytes > size:
        raise FileFormatError(
            f"tensor {name} ends at byte {data + offset + nbytes}, the file at {size}: truncated; "
            "download or convert it again"
        )
    return TensorInfo(name, shape, type_name, nbytes, data + offset, part)


def _check_apart(tensors: list[TensorInfo]) -> None:
    end, before = 0, ""
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset < end:
            raise FileFormatError(f"tensor {info.name} overlaps tensor {before}; convert the model again")
        end, before = info.offset + info.nbytes, info.name


def _ggml_type(name: str, kind: int) -> tuple[str, int, int]:
    """A ggml type's name, elements a block and bytes a block."""
    if kind in VIEWED:
        type_name, dtype = VIEWED[kind]
        return type_name, 1, np.dtype(dtype).itemsize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # late: slow to import, rarely needed

    try:
        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
    except (ValueError, KeyError):
        raise FileFormatError(f"tensor {name} has the unknown type {kind}") from None
    return known.name, block, block_bytes
