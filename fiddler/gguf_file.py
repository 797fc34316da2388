"""Opens a GGUF file: maps it, walks its header once, validates it, gives tensors as views into the mapping.

The only reader of GGUF bytes. Knows the container; not what the metadata means, nor torch. The format is
described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Nothing a header says is trusted: every
length and offset is held against the file's size before anything is allocated or viewed, since an access past
the end of a mapping kills the process.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fiddler.errors import FileFormatError

__all__ = ["GgufFile", "TensorInfo"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, tuple[str, int]] = {  # GGUF value type -> (struct code, bytes)
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    _BOOL: ("<?", 1),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_VIEWED = {0: ("F32", "<f4"), 1: ("F16", "<u2"), 30: ("BF16", "<u2")}  # ggml type -> name, dtype of the view
_MOST_STRINGS = 1 << 21  # in one array; the largest vocabularies have 2**18
_MOST_DIMS = 4
_LONGEST_NAME = 64  # GGML_MAX_NAME
_LARGEST_ALIGNMENT = 1 << 20
_PART = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` has the slowest dimension first, as in numpy; GGUF stores the reverse."""

    name: str
    shape: tuple[int, ...]
    type: str  # ggml's name: "F32", "F16", "BF16", "Q4_K", ...
    nbytes: int
    offset: int  # bytes from the start of its file
    part: int  # which file of a split model, from 0


class GgufFile:
    """A validated GGUF model, in one file or several, mapped read-only and shared.

    `metadata` holds str, int, float and bool; arrays of strings are `list[str]`, other arrays 1-D numpy arrays.
    `tensors` maps a name to its `TensorInfo`, in file order.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, object],
        tensors: dict[str, TensorInfo],
        maps: list[mmap.mmap],
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._maps = maps

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map and validate `path`; for a split model any one of its parts opens them all.

        Raises FileFormatError, in one line that names the file, when it is missing, truncated or malformed.
        """
        path = Path(path)
        first = _open_part(path, 0)
        count = first.metadata.get("split.count", 1)
        if not isinstance(count, int) or count < 2:
            return cls(path, first.version, first.metadata, _index([first]), [first.map])
        parts = [_open_part(part, number) for number, part in enumerate(_part_paths(path, count))]
        for number, part in enumerate(parts):
            if part.metadata.get("split.count") != count or part.metadata.get("split.no") != number:
                raise FileFormatError(
                    f"{part.path}: says it is part {part.metadata.get('split.no')} of "
                    f"{part.metadata.get('split.count')}, expected {number} of {count}; download the parts again"
                )
        tensors = _index(parts)
        expected = parts[0].metadata.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise FileFormatError(
                f"{path}: its parts hold {len(tensors)} tensors, the first says {expected}; download them again"
            )
        return cls(path, parts[0].version, parts[0].metadata, tensors, [part.map for part in parts])

    @property
    def nbytes(self) -> int:
        """Bytes mapped, over all parts."""
        return sum(len(part) for part in self._maps)

    def array(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in the mapping: float32 for F32, uint16 *bits* for F16 and BF16.

        Raises FileFormatError when there is no such tensor or its type is one that cannot be viewed.
        """
        info = self.tensors.get(name)
        if info is None:
            raise FileFormatError(f"{self.path}: has no tensor {name}; convert the model again")
        dtype = next((dtype for known, dtype in _VIEWED.values() if known == info.type), None)
        if dtype is None:
            raise FileFormatError(
                f"{self.path}: tensor {name} is {info.type}; only F32, F16 and BF16 run: "
                "use the unquantised file, or convert the original checkpoint"
            )
        flat = np.frombuffer(self._maps[info.part], dtype, math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)


@dataclass(frozen=True)
class _Part:
    path: Path
    version: int
    metadata: dict[str, object]
    tensors: list[TensorInfo]
    map: mmap.mmap


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _PART.match(path.name)
    if match is None or int(match["count"]) != count:
        raise FileFormatError(
            f"{path}: is one of {count} parts, but is not named like STEM-00001-of-{count:05}.gguf; restore its name"
        )
    paths = [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise FileFormatError(f"{part}: this part of {count} is missing; put all parts in one folder")
    return paths


def _index(parts: list[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for info in part.tensors:
            if info.name in tensors:
                raise FileFormatError(f"{part.path}: tensor {info.name} appears twice")
            tensors[info.name] = info
    return tensors


def _open_part(path: Path, number: int) -> _Part:
    try:
        with path.open("rb") as file:
            if not path.is_file():
                raise FileFormatError(f"{path}: not a regular file; give the path of a .gguf file")
            head = file.read(4)
            if head != _MAGIC:
                raise FileFormatError(
                    f"{path}: starts with {head!r}, not {_MAGIC!r}; give a GGUF file, or convert a "
                    "Hugging Face folder with `fiddler convert`"
                )
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # MAP_SHARED, PROT_READ
    except IsADirectoryError:
        raise FileFormatError(
            f"{path}: is a folder; convert a Hugging Face folder with `fiddler convert {path} OUT.gguf`"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileFormatError(f"{path}: cannot be opened: {reason}") from None
    try:
        return _Header(path, mapped, number).read()
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None


class _Header:
    """One walk over a header, front to back."""

    def __init__(self, path: Path, mapped: mmap.mmap, number: int) -> None:
        self._path, self._map, self._number = path, mapped, number
        self._size = len(mapped)
        self._at = 0

    def read(self) -> _Part:
        self._skip(len(_MAGIC), "magic")
        version = self._unpack("<I", 4, "version")
        if version not in _VERSIONS:
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            kind = "big-endian" if swapped in _VERSIONS else f"version {version}"
            raise FileFormatError(f"is a {kind} GGUF; little-endian version 2 or 3 is read: convert the model again")
        tensor_count = self._unpack("<Q", 8, "tensor count")
        pair_count = self._unpack("<Q", 8, "metadata count")
        self._fits(tensor_count, 32, "tensors")
        self._fits(pair_count, 13, "metadata pairs")
        metadata: dict[str, object] = {}
        for _ in range(pair_count):
            key = self._string("metadata key")
            if key in metadata:
                raise FileFormatError(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._unpack("<I", 4, f"type of {key!r}"), key)
        alignment = metadata.get("general.alignment", 32)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or not 8 <= alignment <= _LARGEST_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise FileFormatError(f"general.alignment is {alignment!r}; it must be a power of two from 8 to 2**20")
        headers = [self._tensor_header() for _ in range(tensor_count)]
        data = -(-self._at // alignment) * alignment
        return _Part(self._path, version, metadata, self._tensors(headers, data, alignment), self._map)

    def _tensors(
        self, headers: list[tuple[str, tuple[int, ...], int, int]], data: int, alignment: int
    ) -> list[TensorInfo]:
        tensors: list[TensorInfo] = []
        names: set[str] = set()
        for name, shape, kind, offset in headers:
            if name in names:
                raise FileFormatError(f"tensor {name} appears twice")
            names.add(name)
            type_name, block, block_bytes = _ggml_type(name, kind)
            if shape[-1] % block:
                raise FileFormatError(f"tensor {name}: rows of {shape[-1]} are not whole blocks of {block} {type_name}")
            nbytes = math.prod(shape) // block * block_bytes
            if offset % alignment:
                raise FileFormatError(f"tensor {name}: offset {offset} is not a multiple of the alignment {alignment}")
            if data + offset + nbytes > self._size:
                raise FileFormatError(
                    f"tensor {name} ends at byte {data + offset + nbytes}, the file at {self._size}: "
                    "truncated; download or convert it again"
                )
            tensors.append(TensorInfo(name, shape, type_name, nbytes, data + offset, self._number))
        end, before = data, ""
        for info in sorted(tensors, key=lambda info: info.offset):
            if info.offset < end:
                raise FileFormatError(f"tensor {info.name} overlaps {before}")
            end, before = info.offset + info.nbytes, info.name
        return tensors

    def _tensor_header(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("tensor name")
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise FileFormatError(f"tensor name {name[:80]!r} is not 1 to {_LONGEST_NAME} printable characters")
        dims = self._unpack("<I", 4, f"dimension count of {name}")
        if not 1 <= dims <= _MOST_DIMS:
            raise FileFormatError(f"tensor {name} has {dims} dimensions; 1 to {_MOST_DIMS} are possible")
        shape = tuple(self._unpack("<Q", 8, f"dimensions of {name}") for _ in range(dims))[::-1]
        if min(shape) < 1 or math.prod(shape) >= 1 << 62:
            raise FileFormatError(f"tensor {name} has the impossible shape {shape}")
        return name, shape, self._unpack("<I", 4, f"type of {name}"), self._unpack("<Q", 8, f"offset of {name}")

    def _value(self, kind: int, key: str) -> object:
        if kind == _STRING:
            return self._string(f"value of {key!r}")
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise FileFormatError(f"metadata key {key!r} has the unknown type {kind}")
        return self._unpack(*_SCALARS[kind], f"value of {key!r}")

    def _array(self, key: str) -> list[str] | np.ndarray:
        kind = self._unpack("<I", 4, f"type of {key!r}")
        count = self._unpack("<Q", 8, f"length of {key!r}")
        if kind == _STRING:
            self._fits(count, 8, f"strings in {key!r}")
            if count > _MOST_STRINGS:
                raise FileFormatError(f"{key!r} holds {count} strings; at most {_MOST_STRINGS} are read")
            what = f"strings of {key!r}"
            return [self._string(what) for _ in range(count)]
        if kind not in _SCALARS:
            raise FileFormatError(f"{key!r} is an array of the unsupported type {kind}")
        code, width = _SCALARS[kind]
        self._fits(count, width, f"values in {key!r}")
        values = np.frombuffer(self._map, "?" if kind == _BOOL else code, count, self._at).copy()
        self._at += count * width
        return values

    def _string(self, what: str) -> str:
        at = self._at
        if at + 8 > self._size:
            self._ended(what)
        (length,) = _U64.unpack_from(self._map, at)
        end = at + 8 + length
        if end > self._size:
            raise FileFormatError(f"{what} at byte {at} says it is {length} bytes long, past the end of the file")
        self._at = end
        try:
            return self._map[at + 8 : end].decode("utf-8")
        except UnicodeDecodeError:
            raise FileFormatError(f"{what} at byte {at} is not UTF-8") from None

    def _unpack(self, code: str, width: int, what: str) -> int:
        at = self._at
        self._skip(width, what)
        value: int = struct.unpack_from(code, self._map, at)[0]
        return value

    def _skip(self, width: int, what: str) -> None:
        if self._at + width > self._size:
            self._ended(what)
        self._at += width

    def _fits(self, count: int, least_bytes: int, what: str) -> None:
        if count > (self._size - self._at) // least_bytes:
            raise FileFormatError(f"says it has {count} {what}, more than its {self._size} bytes can hold")

    def _ended(self, what: str) -> None:
        raise FileFormatError(f"ends at byte {self._size}, inside the {what}: truncated; download it again")


_U64 = struct.Struct("<Q")


def _ggml_type(name: str, kind: int) -> tuple[str, int, int]:
    """A ggml type's name, elements a block and bytes a block."""
    if kind in _VIEWED:
        type_name, dtype = _VIEWED[kind]
        return type_name, 1, np.dtype(dtype).itemsize
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # late: slow to import, rarely needed

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        raise FileFormatError(f"tensor {name} has the unknown type {kind}") from None
    block, block_bytes = GGML_QUANT_SIZES[known]
    return known.name, block, block_bytes
