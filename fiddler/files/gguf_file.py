"""Opens a GGUF model, in one file or split into parts: maps it, validates its header, returns tensors as views.

The only reader of GGUF files. Knows files and mappings; not what the metadata means, nor torch. The mapping is
shared and read-only, so a model takes no memory of its own. It stays valid when the file is replaced or deleted;
truncating a file *in place* while a model runs from it ends the process: the command line says so in one line
(`fiddler.files.bus_error`), other programs get SIGBUS, as with any mapped file. `rows` reads instead.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.files.gguf_header import VIEW_TYPES, Header, TensorInfo, printable
from fiddler.files.mapped_files import add_mapping
from fiddler.input_file import open_regular

__all__ = ["GgufFile", "TensorInfo"]

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII | re.DOTALL)
_MAX_PATH_CHARS = 300  # of a path in an error message


class GgufFile:
    """A validated GGUF model in one or more files, mapped read-only and shared.

    `metadata` holds str, int, float and bool; arrays of strings are `list[str]`, other arrays 1-D numpy arrays.
    `tensors` maps a name to its `TensorInfo`, in file order; `value_types` a key to its types in the file.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, object],
        tensors: dict[str, TensorInfo],
        maps: list[mmap.mmap],
        descriptors: list[int],
        value_types: dict[str, tuple[int, int]],
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self.value_types = value_types
        self._maps, self._descriptors = maps, descriptors

    @classmethod
    def open(cls, path: str | Path) -> GgufFile:
        """Map and validate `path`; any part of a split model opens all parts.

        Raises FileFormatError, one printable line that names the file, if a file is missing, truncated or malformed.
        """
        path = Path(path)
        parts = [_Part.open(path)]
        count = parts[0].count()
        if count > 1:
            parts = [_Part.open(part_path, number, count) for number, part_path in enumerate(_part_paths(path, count))]
        tensors = _index(parts)
        expected = parts[0].header.metadata.get("split.tensors.count", len(tensors))
        if count > 1 and not (isinstance(expected, int) and expected == len(tensors)):
            raise FileFormatError(
                f"{_shown(path)}: its parts hold {len(tensors)} tensors, the first says {printable(expected)}; "
                "download them again"
            )
        first = parts[0].header
        maps, descriptors = [part.map for part in parts], [part.descriptor for part in parts]
        return cls(path, first.version, first.metadata, tensors, maps, descriptors, first.value_types)

    @property
    def nbytes(self) -> int:
        """Size of all mappings [bytes]."""
        return sum(len(part) for part in self._maps)

    @property
    def mappings(self) -> list[tuple[int, int]]:
        """Address and size [bytes] of each part's mapping."""
        views = [np.frombuffer(part, np.uint8) for part in self._maps]
        return [(int(view.ctypes.data), view.nbytes) for view in views]

    @property
    def shown_path(self) -> str:
        """`path` for an error message: one printable line."""
        return _shown(self.path)

    def array(self, name: str) -> np.ndarray:
        """A read-only view of one tensor in the mapping: float32 for F32, uint16 *bits* for F16 and BF16.

        Raises FileFormatError if the tensor does not exist or has another type.
        """
        info, dtype = self._info(name)
        flat = np.frombuffer(self._maps[info.part], dtype, math.prod(info.shape), info.offset)
        return flat.reshape(info.shape)

    def stored(self, name: str) -> np.ndarray:
        """A read-only view of one tensor of any type: uint8 [..., bytes of a row].

        Raises FileFormatError if the tensor does not exist.
        """
        info = self.tensors.get(name)
        if info is None:
            raise self._missing(name)
        flat = np.frombuffer(self._maps[info.part], np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of a tensor viewed as a matrix [rows, last dimension]; types and errors as of `array`.

        They are read, not mapped: raises FileFormatError, too, where the file was cut short meanwhile.
        """
        info, dtype = self._info(name)
        width = info.shape[-1]
        rows = np.empty((stop - start, width), dtype)
        begin = info.offset + start * width * rows.itemsize
        assert info.offset <= begin <= begin + rows.nbytes <= info.offset + info.nbytes
        buffer, done = rows.view(np.uint8).reshape(-1).data, 0
        while done < len(buffer):
            try:
                read = os.preadv(self._descriptors[info.part], [buffer[done:]], begin + done)
            except OSError as error:
                raise FileFormatError(f"{self.shown_path}: cannot be read: {error.strerror}") from None
            if not read:
                raise FileFormatError(f"{self.shown_path}: was cut short while in use; restore the file")
            done += read
        rows.flags.writeable = False
        return rows

    def _missing(self, name: str) -> FileFormatError:
        return FileFormatError(f"{self.shown_path}: has no tensor {printable(name)}; convert the model again")

    def _info(self, name: str) -> tuple[TensorInfo, str]:
        """A tensor and the numpy type of its values."""
        info = self.tensors.get(name)
        if info is None:
            raise self._missing(name)
        dtype = next((dtype for type_name, dtype in VIEW_TYPES.values() if type_name == info.type), None)
        if dtype is None:
            raise FileFormatError(
                f"{self.shown_path}: tensor {name} is {info.type}; only F32, F16 and BF16 run: "
                "use the unquantised file, or convert the original checkpoint"
            )
        return info, dtype


def _shown(path: Path) -> str:
    """A path for an error message: one printable line."""
    return printable(path, _MAX_PATH_CHARS)


@dataclass(frozen=True)
class _Part:
    path: Path
    header: Header
    map: mmap.mmap
    descriptor: int  # open as long as the mapping lives

    @classmethod
    def open(cls, path: Path, number: int = 0, count: int = 1) -> _Part:
        """Map and validate one file; if `count` > 1, its metadata must name it part `number` (from 0) of `count`."""
        try:
            mapping, descriptor = _map_file(path)
            part = cls(path, Header.parse(mapping, number), mapping, descriptor)
            if count > 1:
                part._check(number, count)
        except FileNotFoundError:
            missing = f"this part of {count} is missing; put all parts in one folder"
            raise FileFormatError(f"{_shown(path)}: {missing if count > 1 else 'no such file'}") from None
        except FileFormatError as error:
            raise FileFormatError(f"{_shown(path)}: {error}") from None
        except (OSError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or printable(error)
            raise FileFormatError(
                f"{_shown(path)}: cannot be opened: {reason}; give the path of a .gguf file"
            ) from None
        return part

    def count(self) -> int:
        """Number of the model's parts according to this part's metadata; 1 if the model is not split."""
        value = self.header.metadata.get("split.count", 1)
        if type(value) is not int or value < 0:  # not isinstance: True is an int, too
            raise FileFormatError(
                f"{_shown(self.path)}: split.count is '{printable(value)}'; it must be a number of files"
            )
        return max(value, 1)

    def _check(self, number: int, count: int) -> None:
        recorded = [self.header.metadata.get(key) for key in ("split.no", "split.count")]
        if not all(type(value) is int for value in recorded) or recorded != [number, count]:
            raise FileFormatError(
                f"has split.no {printable(recorded[0])} and split.count {printable(recorded[1])}, but its name "
                f"stands for {number} and {count}; restore its name or download the parts again"
            )


def _map_file(path: Path) -> tuple[mmap.mmap, int]:
    """A mapping, and a descriptor that is closed with it: both stay this file's where another one gets its name."""
    try:
        file = open_regular(path)
    except IsADirectoryError:
        raise FileFormatError(
            f"is a folder; convert a Hugging Face folder with `fiddler convert {_shown(path)} OUT.gguf`"
        ) from None
    with file:
        if os.fstat(file.fileno()).st_size == 0:
            raise FileFormatError("is empty; download or convert it again")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # MAP_SHARED, PROT_READ
        add_mapping(mapping, _shown(path))
        descriptor = os.dup(file.fileno())
        weakref.finalize(mapping, os.close, descriptor).atexit = False
        return mapping, descriptor


def _part_paths(path: Path, count: int) -> list[Path]:
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise FileFormatError(
            f"{_shown(path)}: is one of {count} parts, but is not named like STEM-00001-of-{count:05}.gguf; "
            "restore its name"
        )
    return [path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _index(parts: list[_Part]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for part in parts:
        for info in part.header.tensors:
            if info.name in tensors:
                raise FileFormatError(f"{_shown(part.path)}: tensor {info.name} appears twice; convert the model again")
            tensors[info.name] = info
    return tensors
