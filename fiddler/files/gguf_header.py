"""Parses the header of a GGUF file: one pass over its bytes, front to back, that trusts no value in it.

Every length and offset is checked against the file's size before anything is allocated or viewed: an access past
the end of a mapping kills the process. Limits far above any model's needs bound the memory and the time that a
header can cost. Knows the container format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); not files,
and not what the metadata means.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass

import numpy as np

from fiddler.errors import FileFormatError

__all__ = ["ARRAY", "BOOL", "MAGIC", "SCALARS", "STRING", "VERSIONS", "VIEW_TYPES", "Header", "TensorInfo", "printable"]

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
VIEW_TYPES = {0: ("F32", "<f4"), 1: ("F16", "<u2"), 30: ("BF16", "<u2")}  # ggml type -> name, dtype of the view

_LFS = b"version https://git-lfs"  # how a pointer of Git LFS begins

# The largest vocabularies (2**18 tokens, twice as many merges) need 1/3 of these bytes and 3/4 of these strings.
_MAX_HEADER = 1 << 26  # bytes
_MAX_PAIRS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_STRINGS = 1 << 20  # in all arrays together
_MAX_DIMS = 4  # GGML_MAX_DIMS
_MAX_NAME = 64  # GGML_MAX_NAME
_MAX_ALIGNMENT = 1 << 20  # bytes
_U64 = struct.Struct("<Q")


def _less_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[next((index for index, size in enumerate(shape) if size != 1), len(shape)) :]


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor. `shape` has the slowest dimension first, as in numpy; GGUF stores the reverse."""

    name: str
    shape: tuple[int, ...]
    type: str  # ggml's name: "F32", "F16", "BF16", "Q4_K", ...
    nbytes: int
    offset: int  # bytes from the start of its file
    part: int  # index of its file in a split model, from 0

    @property
    def row_bytes(self) -> int:
        """Size of a row, the last dimension [bytes]."""
        return self.nbytes * self.shape[-1] // math.prod(self.shape)

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether the shape is `shape`, but for leading ones: ggml has four dimensions, [1, D] is a vector to it."""
        return self.shape == shape or _less_ones(self.shape) == _less_ones(shape)


@dataclass(frozen=True)
class Header:
    """The header of one file; its tensors do not overlap."""

    version: int
    metadata: dict[str, object]  # str, int, float, bool, list[str] and 1-D numpy arrays
    tensors: list[TensorInfo]
    value_types: dict[str, tuple[int, int]]  # of each key: GGUF's value type, and that of an array's elements

    @classmethod
    def parse(cls, data: mmap.mmap | bytes, part: int = 0, size: int | None = None) -> Header:
        """Parse the header of `data`, a whole file; `part` is the part number of its tensors.

        size: of the file [bytes], where `data` holds no more than its header.
        Raises FileFormatError, one printable line that does not name the file, if the header is malformed.
        """
        return _HeaderReader(data, len(data) if size is None else size).header(part)


def printable(value: object, max_chars: int = 60) -> str:
    """A value from a file for a message or a terminal: one line of at most about `max_chars` printable characters."""
    text = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else str(value)
    if len(text) > max_chars:
        text = text[:max_chars] + "..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _HeaderReader:
    def __init__(self, data: mmap.mmap | bytes, size: int) -> None:
        self._data = data
        self._size = size
        self._end = min(len(data), _MAX_HEADER)
        self._position = 0
        self._strings_left = _MAX_STRINGS

    def header(self, part: int) -> Header:
        magic = self._data[: len(MAGIC)]
        if magic != MAGIC:
            if self._data[: len(_LFS)] == _LFS:
                raise FileFormatError("is a Git LFS pointer, not the file itself; run `git lfs pull`")
            raise FileFormatError(
                f"starts with {magic!r}, not {MAGIC!r}; give a GGUF file, or convert a Hugging Face folder with "
                "`fiddler convert`"
            )
        self._position = len(MAGIC)
        version = self._integer("<I", 4, "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "big-endian" if swapped in VERSIONS else f"version {version}"
            raise FileFormatError(f"is a {kind} GGUF; little-endian version 2 or 3 is read: convert the model again")
        tensor_count = self._integer("<Q", 8, "tensor count")
        pair_count = self._integer("<Q", 8, "metadata count")
        self._check_count(tensor_count, 32, _MAX_TENSORS, "tensors")
        self._check_count(pair_count, 13, _MAX_PAIRS, "metadata pairs")
        metadata: dict[str, object] = {}
        value_types: dict[str, tuple[int, int]] = {}
        for _ in range(pair_count):
            key = self._string("a metadata key")
            field = f"metadata key '{printable(key)}'"
            if key in metadata:
                raise FileFormatError(f"{field} appears twice")
            value_type, start = self._integer("<I", 4, field), self._position
            metadata[key] = self._value(value_type, field)
            is_array = value_type == ARRAY
            value_types[key] = value_type, struct.unpack_from("<I", self._data, start)[0] if is_array else value_type
        alignment = _alignment(metadata)
        entries = [self._entry() for _ in range(tensor_count)]
        data_start = -(-self._position // alignment) * alignment
        tensors = [_tensor_info(*entry, data_start, alignment, self._size, part) for entry in entries]
        _check_overlaps(tensors)
        return Header(version, metadata, tensors, value_types)

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """One tensor's name, shape, type and offset into the data section [bytes]."""
        name = self._string("a tensor name")
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise FileFormatError(f"tensor name '{printable(name)}' is not 1 to {_MAX_NAME} printable characters")
        field = f"tensor {name}"
        dims = self._integer("<I", 4, field)
        if not 1 <= dims <= _MAX_DIMS:
            raise FileFormatError(f"{field} has {dims} dimensions; 1 to {_MAX_DIMS} are possible")
        shape = tuple([self._integer("<Q", 8, field) for _ in range(dims)])[::-1]
        if min(shape) < 1 or math.prod(shape) >= 1 << 62:
            raise FileFormatError(f"{field} has the impossible shape {shape}")
        return name, shape, self._integer("<I", 4, field), self._integer("<Q", 8, field)

    def _value(self, kind: int, field: str) -> object:
        if kind == STRING:
            return self._string(field)
        if kind == ARRAY:
            return self._array(field)
        if kind not in SCALARS:
            raise FileFormatError(f"{field} has the unknown type {kind}")
        code, width = SCALARS[kind]
        self._advance(width, field)
        value = struct.unpack_from(code, self._data, self._position - width)[0]
        return self._bool(value, field) if kind == BOOL else value

    def _array(self, field: str) -> list[str] | np.ndarray:
        kind = self._integer("<I", 4, field)
        count = self._integer("<Q", 8, field)
        if kind == STRING:
            self._check_count(count, 8, self._strings_left, f"strings in {field}")
            self._strings_left -= count
            return [self._string(field) for _ in range(count)]
        if kind not in SCALARS:
            raise FileFormatError(f"{field} is an array of the unsupported type {kind}")
        code, width = SCALARS[kind]
        self._check_count(count, width, _MAX_HEADER, f"values in {field}")
        values = np.frombuffer(self._data, code, count, self._position).copy()
        self._position += count * width
        if kind == BOOL:
            self._bool(int(values.max(initial=0)), field)
            return values.astype(np.bool_)
        return values

    @staticmethod
    def _bool(value: int, field: str) -> bool:
        if value > 1:
            raise FileFormatError(f"{field} is a bool of value {value}; it must be 0 or 1")
        return value == 1

    def _string(self, field: str) -> str:
        start = self._position + 8
        if start > self._end:
            self._raise_truncated(field)
        (length,) = _U64.unpack_from(self._data, start - 8)
        end = start + length
        if end > self._end:
            raise FileFormatError(
                f"{field}: the string at byte {start} says it is {length} bytes long, past the end of the "
                + ("file" if end > self._size else f"largest header of {self._end} bytes")
            )
        self._position = end
        try:
            return self._data[start:end].decode("utf-8")
        except UnicodeDecodeError:
            raise FileFormatError(
                f"{field}: the string at byte {start} is not UTF-8; convert the model again"
            ) from None

    def _integer(self, code: str, width: int, field: str) -> int:
        self._advance(width, field)
        value: int = struct.unpack_from(code, self._data, self._position - width)[0]
        return value

    def _advance(self, width: int, field: str) -> None:
        if self._position + width > self._end:
            self._raise_truncated(field)
        self._position += width

    def _check_count(self, count: int, min_bytes: int, max_count: int, items: str) -> None:
        if count > (self._size - self._position) // min_bytes:
            raise FileFormatError(f"says it has {count} {items}, more than its {self._size} bytes can hold")
        if count > max_count or count > (self._end - self._position) // min_bytes:
            raise FileFormatError(
                f"says it has {count} {items}, far more than any model needs; convert the model again"
            )

    def _raise_truncated(self, field: str) -> None:
        if self._end < self._size:
            raise FileFormatError(f"has a header of more than {self._end} bytes; convert the model again")
        raise FileFormatError(f"ends at byte {self._size}, inside {field}: truncated; download or convert it again")


def _alignment(metadata: dict[str, object]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is int and 8 <= value <= _MAX_ALIGNMENT and not value & (value - 1):  # True is an int
        return value
    shown = printable(value)
    raise FileFormatError(f"general.alignment is '{shown}'; it must be a power of two from 8 to {_MAX_ALIGNMENT}")


def _tensor_info(
    name: str, shape: tuple[int, ...], kind: int, offset: int, data_start: int, alignment: int, size: int, part: int
) -> TensorInfo:
    """Check that a tensor is aligned, whole and inside the file of `size` bytes; `offset` counts from `data_start`."""
    type_name, block, block_bytes = _ggml_type(name, kind)
    if shape[-1] % block:
        raise FileFormatError(f"tensor {name}: rows of {shape[-1]} are not whole blocks of {block} {type_name}")
    nbytes = math.prod(shape) // block * block_bytes
    if offset % alignment:
        raise FileFormatError(f"tensor {name}: offset {offset} is not a multiple of the alignment {alignment}")
    if data_start + offset + nbytes > size:
        raise FileFormatError(
            f"tensor {name} ends at byte {data_start + offset + nbytes}, the file at {size}: truncated; "
            "download or convert it again"
        )
    return TensorInfo(name, shape, type_name, nbytes, data_start + offset, part)


def _check_overlaps(tensors: list[TensorInfo]) -> None:
    end, previous = 0, ""
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset < end:
            raise FileFormatError(f"tensor {info.name} overlaps tensor {previous}; convert the model again")
        end, previous = info.offset + info.nbytes, info.name


def _ggml_type(name: str, kind: int) -> tuple[str, int, int]:
    """A ggml type's name, elements per block and bytes per block."""
    if kind in VIEW_TYPES:
        type_name, dtype = VIEW_TYPES[kind]
        return type_name, 1, np.dtype(dtype).itemsize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # late: slow to import, rarely needed

    try:
        ggml_type = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[ggml_type]
    except (ValueError, KeyError):
        raise FileFormatError(f"tensor {name} has the unknown type {kind}") from None
    return ggml_type.name, block, block_bytes
