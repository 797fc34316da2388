"""An importance matrix: how large the inputs of each matrix were on some text, in llama.cpp's GGUF form.

A tensor NAME of the model has `NAME.in_sum2`, for each expert and column the sum of squared inputs, and `NAME.counts`,
for each expert the number of inputs; what an error of a weight costs is their quotient. (llama.cpp: tools/imatrix.)
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fiddler.errors import FileFormatError, quoted
from fiddler.files.gguf_file import GgufFile
from fiddler.files.gguf_header import MAGIC
from fiddler.input_file import open_regular

__all__ = ["ImportanceMatrix"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_FLOOR = 1e-6  # of a matrix's mean importance: columns whose inputs were 0 on that text keep some
_REMEDY = "make it again with llama-imatrix"


class ImportanceMatrix:
    """An opened file; values are read when they are asked for."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    @classmethod
    def open(cls, path: Path) -> ImportanceMatrix:
        """Raises FileFormatError for a file that is damaged, in the old form (.dat), or something else."""
        _refuse_old_form(path)
        file = GgufFile.open(path)
        ends = {_SUMS: _COUNTS, _COUNTS: _SUMS}
        found = 0
        for name, info in file.tensors.items():
            end = next((end for end in ends if name.endswith(end)), None)
            if end is None:
                continue
            found += 1
            if name.removesuffix(end) + ends[end] not in file.tensors:
                raise FileFormatError(f"{file.shown_path}: has {quoted(name)} without its {ends[end][1:]}; {_REMEDY}")
            if info.type != "F32":
                raise FileFormatError(f"{file.shown_path}: {quoted(name)} is {info.type}, not F32; {_REMEDY}")
        if not found:
            raise FileFormatError(
                f"{file.shown_path}: is no importance matrix: has no tensor NAME{_SUMS}; make one with llama-imatrix"
            )
        return cls(file)

    def metadata(self) -> dict[str, str | int]:
        """GGUF keys of a model that was quantised by this file, as llama-quantize writes them."""
        keys: dict[str, str | int] = {"quantize.imatrix.file": self._file.path.name}
        texts, chunks = (self._file.metadata.get(f"imatrix.{key}") for key in ("datasets", "chunk_count"))
        if isinstance(texts, list) and texts:
            keys["quantize.imatrix.dataset"] = str(texts[0])
        keys["quantize.imatrix.entries_count"] = len(self._file.tensors) // 2
        if isinstance(chunks, int) and 0 < chunks < 1 << 32:
            keys["quantize.imatrix.chunks_count"] = chunks
        return keys

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
        """The names among these tensors of the model that have no entry.

        Raises FileFormatError as `of` does, so that nothing is written first.
        """
        return tuple(name for name, shape in shapes.items() if self.of(name, shape) is None)

    def of(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        """Importances [E, K] of the columns of a tensor's E matrices, each with a mean of 1; None without an entry.

        shape: the tensor's, [..., rows, K]. A matrix that got no input has 1 everywhere, as in llama-quantize; a
        token_embd of another size counts as missing, as there.

        Raises FileFormatError for an entry of another size, or with values that are no finite sums.
        """
        if name + _SUMS not in self._file.tensors:
            return None
        sums = self._file.array(name + _SUMS).reshape(-1)
        counts = self._file.array(name + _COUNTS).reshape(-1)
        count, columns = math.prod(shape[:-2]), shape[-1]
        if sums.size != count * columns or counts.size not in (1, count):
            if name == "token_embd.weight":
                return None
            raise FileFormatError(
                f"{self._file.shown_path}: {quoted(name)} has {sums.size} sums and {counts.size} counts, the model "
                f"{count} x {columns} columns; make it from this model with llama-imatrix"
            )
        for values in (sums, counts):
            wrong = ~(np.isfinite(values) & (values >= 0))
            if wrong.any():
                what = f"{quoted(name)} has the value {float(values[wrong][0])}"
                raise FileFormatError(f"{self._file.shown_path}: {what}; {_REMEDY}")
        return _normalised(sums.reshape(count, columns), np.rint(counts))


def _normalised(sums: NDArray[np.float32], counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Only ratios within a matrix matter to a search for scales, and these sums do not leave float32's range."""
    wide = sums.astype(np.float64)
    wide[np.broadcast_to(counts == 0, len(wide))] = 1
    means = wide.mean(axis=-1, keepdims=True)
    return np.where(means > 0, np.maximum(wide / np.where(means > 0, means, 1), _FLOOR), 1).astype(np.float32)


def _refuse_old_form(path: Path) -> None:
    """Raise FileFormatError for a file that begins with a number of entries and the length of a name."""
    try:
        with open_regular(path) as file:
            begin = file.read(8)
    except OSError:
        return  # GgufFile says why
    if len(begin) == 8 and not begin.startswith(MAGIC):
        entries, length = struct.unpack("<ii", begin)
        if 0 < entries < 1 << 17 and 0 < length < 1 << 10:
            raise FileFormatError(
                f"{quoted(str(path))}: is an importance matrix in llama.cpp's old form; "
                "convert it with llama-imatrix --in-file OLD -o NEW.gguf"
            )
