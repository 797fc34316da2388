"""Finds the tensors of a checkpoint by transformers' names: which rows of which stored tensor make a GGUF tensor.

Knows the expert layouts and the rules of shapes; changes no value, and reads no tensor data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fiddler.converters.family import Family, StoredAs
from fiddler.converters.mxfp4 import BLOCK, PackedMatrix
from fiddler.converters.safetensors_file import DTYPES, FLOATS, Array, StoredTensor
from fiddler.converters.source_folder import is_quantised
from fiddler.converters.weight_files import WeightFile
from fiddler.errors import CheckpointError, quoted
from fiddler.models.architecture import ModelTensor, Role
from fiddler.models.config import Config

__all__ = ["Columns", "Computed", "Matrix", "Source", "TensorLookup", "Transposed"]

# Old checkpoints store this table, too; it follows from rope_theta and head_dim.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

_TURNED = 32  # rows transposed at once: a cache line of 16-bit numbers; 7 times as fast as all of DBRX's 10752


@dataclass(frozen=True)
class Matrix:
    """`count` rows from row `first` of a stored tensor viewed as a matrix [rows, width]: one expert, or all rows."""

    file: WeightFile
    stored: StoredTensor
    first: int
    count: int

    @property
    def width(self) -> int:
        return self.stored.shape[-1]

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop` of this matrix, [stop - start, width], read from the file.

        float32, float16, or uint16 where the values are bfloat16.
        """
        return self.file.rows(self.stored, self.first + start, stop - start)


@dataclass(frozen=True)
class Transposed:
    """A matrix with rows and columns exchanged: all columns, or every `step`-th from `first` on."""

    of: Matrix
    first: int = 0
    step: int = 1

    @property
    def stored(self) -> StoredTensor:
        return self.of.stored

    @property
    def count(self) -> int:
        return self.of.width // self.step

    @property
    def width(self) -> int:
        return self.of.count

    def rows(self, start: int, stop: int) -> Array:
        """As `Matrix.rows`. Reads the whole matrix each time."""
        rows = np.empty((stop - start, self.width), DTYPES[self.stored.dtype])
        for first in range(0, self.width, _TURNED):
            last = min(first + _TURNED, self.width)
            rows[:, first:last] = self.of.rows(first, last)[:, self.first :: self.step][:, start:stop].T
        return rows


@dataclass(frozen=True)
class Columns:
    """Every second column of a matrix, from `first` on."""

    of: Matrix
    first: int

    @property
    def stored(self) -> StoredTensor:
        return self.of.stored

    @property
    def count(self) -> int:
        return self.of.count

    @property
    def width(self) -> int:
        return self.of.width // 2

    def rows(self, start: int, stop: int) -> Array:
        """As `Matrix.rows`."""
        return self.of.rows(start, stop)[:, self.first :: 2].copy()


@dataclass(frozen=True)
class Computed:
    """A row of float32 numbers that config.json implies."""

    values: tuple[float, ...]
    stored: None = None
    count: int = 1

    @property
    def width(self) -> int:
        return len(self.values)

    def rows(self, start: int, stop: int) -> Array:
        """As `Matrix.rows`."""
        return np.array([self.values], np.float32)[start:stop]


Source: TypeAlias = Matrix | Transposed | Columns | Computed | PackedMatrix
"""Rows of a tensor of the GGUF."""


class TensorLookup:
    """Finds stored tensors by name and shape, and records which are used."""

    def __init__(self, folder: Path, files: Sequence[WeightFile]) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}
        self._used: set[str] = set()
        for file in files:
            for name in file.tensors:
                if name in self._files:
                    raise CheckpointError(
                        f"tensor {quoted(name)} is in both {self._files[name].path} and {file.path.name}"
                    )
                if is_quantised(name):
                    raise CheckpointError(
                        f"{file.path}: tensor {quoted(name)} belongs to quantised weights; "
                        "convert the original bf16, f16 or f32 checkpoint"
                    )
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def matrices(self, config: Config, family: Family, ignored_layers: range) -> dict[str, Sequence[Source]]:
        """The matrices of exactly the tensors that `config` implies; the output only if it is stored.

        ignored_layers: layers after the model's own, whose tensors are skipped.
        Raises CheckpointError for a tensor that is missing, of another shape or unknown.
        """
        # Check before a list of this length is built: a hostile config.json may say millions.
        if config.block_count > len(self._files):
            raise CheckpointError(
                f"{self._folder}: config.json says num_hidden_layers {config.block_count}, "
                f"but there are only {len(self._files)} tensors; download the whole checkpoint"
            )
        matrices: dict[str, Sequence[Source]] = {}
        tied = family.other_names[Role.OUTPUT] not in self
        for name, tensor in config.tensors(tied=tied).items():
            shape, layer = config.shape(tensor), name.removeprefix("blk.").partition(".")[0]
            if tensor.role in family.other_names:
                matrices[name] = [self._matrix(family.other_names[tensor.role], shape)]
            elif tensor.role is Role.ROPE_DIVISORS and config.rope_scaling is not None:
                matrices[name] = [Computed(config.rope_scaling.divisors)]
            elif tensor.role in (Role.KEY_UP, Role.VALUE_UP):
                stored_as = family.names[tensor.role][0]
                matrices[name] = self._per_head(f"{family.layers}.{layer}.{stored_as.name}", tensor.role, config)
            else:
                matrices[name] = self._layer_matrices(f"{family.layers}.{layer}.", tensor, shape, family)
        for name in self._files:
            if name not in self._used and not _DERIVED.fullmatch(name) and _layer(name) not in ignored_layers:
                raise CheckpointError(
                    f"{self._files[name].path}: tensor {quoted(name)} is not part of a {config.architecture.name} with "
                    f"{config.block_count} layers{f' and {config.expert_count} experts' if config.expert_count else ''}"
                )
        return matrices

    def _layer_matrices(
        self, prefix: str, tensor: ModelTensor, shape: tuple[int, ...], family: Family
    ) -> Sequence[Source]:
        """The matrices of a tensor of one layer, under whichever of the family's names it is stored."""
        names = family.names[tensor.role]
        stored_as = next((each for each in names if prefix + each.name.format(0) in self), names[0])
        name = prefix + stored_as.name
        if "{}" in name:
            return [self._matrix(name.format(expert), shape[1:]) for expert in range(shape[0])]
        if len(shape) == 1:
            return [self._vector(name, shape)]
        return self._stacked(name, stored_as, shape)

    def _per_head(self, name: str, role: Role, config: Config) -> list[Matrix] | list[Transposed]:
        """Each head's rows of keys, transposed, or of values: of one tensor that holds both, head after head."""
        assert config.latent is not None
        plain, value = config.latent.key - config.rotated, config.latent.value
        file, stored = self._find(name, (config.head_count * (plain + value), config.latent.latent))
        firsts = range(0, stored.shape[0], plain + value)
        if role is Role.VALUE_UP:
            return [Matrix(file, stored, first + plain, value) for first in firsts]
        return [Transposed(Matrix(file, stored, first, plain)) for first in firsts]

    def _stacked(self, name: str, stored_as: StoredAs, shape: tuple[int, ...]) -> Sequence[Source]:
        """A matrix [rows, width], or one for each expert of [E, rows, width]; or halves of such matrices."""
        *experts, rows, width = shape
        if stored_as.transposed:
            rows, width = width, rows
        if stored_as.packed:
            return self._packed(name, stored_as, (*experts, rows, width))
        if stored_as.alternating:
            return self._alternating(name, stored_as, (*experts, rows, width))
        times = 1 if stored_as.half is None else 2
        count = experts[0] if experts else 1
        expected = (count * times * rows, width) if stored_as.flat else (*experts, times * rows, width)
        file, stored = self._find(name, expected)
        first = (stored_as.half or 0) * rows
        found = [Matrix(file, stored, expert * times * rows + first, rows) for expert in range(count)]
        return [Transposed(matrix) for matrix in found] if stored_as.transposed else found

    def _alternating(self, name: str, stored_as: StoredAs, shape: tuple[int, ...]) -> Sequence[Source]:
        """Every second column of a matrix, or of one for each expert, which may be transposed. shape: as stored."""
        file, stored = self._find(name, (*shape[:-1], 2 * shape[-1]))
        half, rows = stored_as.half or 0, shape[-2]
        found = [Matrix(file, stored, first, rows) for first in range(0, math.prod(shape[:-1]), rows)]
        return [Transposed(each, half, 2) if stored_as.transposed else Columns(each, half) for each in found]

    def _packed(self, name: str, stored_as: StoredAs, shape: tuple[int, ...]) -> Sequence[Source]:
        """The blocks of MXFP4 of each expert's matrix, and their scales."""
        experts, rows, width = shape
        if width % BLOCK:
            raise CheckpointError(
                f"{self._folder}: tensor {name} would have rows of {width}, no whole blocks of {BLOCK}"
            )
        times = 2 if stored_as.alternating else 1
        blocks = (experts, times * rows, width // BLOCK)
        file, codes = self._find(name, (*blocks, BLOCK // 2), packed=True)
        scale_file, scales = self._find(name.removesuffix("_blocks") + "_scales", blocks, packed=True)
        return [
            PackedMatrix(file, codes, scale_file, scales, expert * times * rows + (stored_as.half or 0), rows, times)
            for expert in range(experts)
        ]

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Matrix:
        file, stored = self._find(name, shape)
        return Matrix(file, stored, 0, 1 if len(shape) == 1 else shape[0])

    def _vector(self, name: str, shape: tuple[int, ...]) -> Matrix:
        """A vector, which may be stored as a matrix of one row."""
        one_row = name in self and self._files[name].tensors[name].shape == (1, *shape)
        return self._matrix(name, (1, *shape) if one_row else shape)

    def _require(self, name: str) -> WeightFile:
        if name not in self._files:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; download the whole checkpoint")
        return self._files[name]

    def _find(self, name: str, shape: tuple[int, ...], *, packed: bool = False) -> tuple[WeightFile, StoredTensor]:
        file = self._require(name)
        stored = file.tensors[name]
        if packed and stored.dtype != "U8":
            raise CheckpointError(f"{file.path}: tensor {name} is {stored.dtype}; blocks of MXFP4 are U8")
        if not packed and stored.dtype not in FLOATS:
            raise CheckpointError(
                f"{file.path}: tensor {name} is {stored.dtype}, a quantised or unusual type; "
                "convert the original bf16, f16 or f32 checkpoint"
            )
        if stored.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {name} has shape {list(stored.shape)}, but config.json implies {list(shape)}"
            )
        self._used.add(name)
        return file, stored


def _layer(name: str) -> int:
    """The layer in a stored tensor's name; -1 where it has none."""
    match = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return int(match[1]) if match else -1
