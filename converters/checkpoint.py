"""A Hugging Face Mixtral folder as a lazy source: locates the matrices of each GGUF tensor.

Knows transformers' tensor names, both expert layouts and the rules of tied embeddings; checks that the folder holds
exactly the tensors that config.json implies, and brings its tokenizer. Changes no value; does not know
where the weights are written to.

Expert layouts, per layer: `block_sparse_moe.experts.E.{w1,w2,w3}` (w1 gate, w2 down, w3 up; the published
checkpoints) and `mlp.experts.{gate_up_proj,down_proj}`, gate rows first (transformers 5 in memory).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import gguf
import numpy as np

from fiddler.converters.hf_config import read_hf_config
from fiddler.converters.mixtral import BLOCK_NAMES, DERIVED, EXPERT_LETTERS, OTHER_NAMES
from fiddler.converters.safetensors_file import DTYPES, Array, StoredTensor
from fiddler.converters.source_folder import check_folder, is_quantised
from fiddler.converters.tokenizer.vocabulary import Vocabulary, read_vocabulary
from fiddler.converters.weight_files import WeightFile, open_weights
from fiddler.errors import CheckpointError, quoted
from fiddler.models.architecture import Role
from fiddler.models.config import Config

__all__ = ["Checkpoint", "Dtype", "Matrix", "WeightFile"]

Dtype: TypeAlias = Literal["bf16", "f16"]
_COMPARED_ROWS = 256


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


class Checkpoint:
    """An opened folder: `config`, `tied`, the `dtype` of most weights, and `matrices` by GGUF name.

    `warnings` are lines for the user about the source.
    """

    interleaves = True  # rows of queries and keys are in transformers' order

    def __init__(
        self,
        name: str,
        config: Config,
        tied: bool,
        matrices: Mapping[str, Sequence[Matrix]],
        vocabulary: Vocabulary,
        warnings: Sequence[str],
    ) -> None:
        self.name = name
        self._vocabulary = vocabulary
        self.config = config
        self.tied = tied
        self.warnings = tuple(warnings)
        self._matrices = matrices

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open `folder`: config.json and its weights, by transformers' precedence: safetensors, else PyTorch's .bin.

        Reads headers only; in a tied checkpoint that stores its output matrix, also that matrix and the embedding,
        to compare them. Raises CheckpointError, one line, for a folder that is incomplete, inconsistent, quantised
        or not a Mixtral.
        """
        check_folder(folder)
        hf_config = read_hf_config(folder)
        lookup = _TensorLookup(folder, open_weights(folder))
        matrices = lookup.matrices(hf_config.config)
        name = hf_config.config.architecture.tensor_name
        output = matrices.get(name(Role.OUTPUT))
        tied, warnings = _resolve_tie(hf_config.tied, output, matrices[name(Role.TOKEN_EMBEDDING)])
        if tied:
            matrices.pop(name(Role.OUTPUT), None)
        window = hf_config.config.sliding_window
        if window is not None and window < hf_config.config.context_length:
            warnings.append(
                f"llama.cpp ignores sliding_window {window} for this architecture: its output will differ "
                f"from position {window} on"
            )
        vocabulary = read_vocabulary(folder, hf_config.config.vocab_size)
        warnings += vocabulary.warnings
        return cls(_model_name(folder.resolve()), hf_config.config, tied, matrices, vocabulary, warnings)

    @property
    def dtype(self) -> Dtype:
        """The 16-bit type of most weights, counted in bytes; bf16 for a float32 checkpoint."""
        bytes_of: Counter[str] = Counter()
        for matrices in self._matrices.values():
            for matrix in matrices:
                bytes_of[matrix.stored.dtype] += matrix.count * matrix.width * DTYPES[matrix.stored.dtype].itemsize
        return "f16" if bytes_of.most_common(1)[0][0] == "F16" else "bf16"

    def matrices(self, name: str) -> Iterator[Matrix]:
        """The matrices that, stacked by rows, make up the GGUF tensor `name` (a vector is one row)."""
        return iter(self._matrices[name])

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the name, the hyper-parameters and the tokenizer."""
        writer.add_name(self.name)
        for key, value in self.config.to_metadata().items():
            if isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        self._vocabulary.write_to(writer)


class _TensorLookup:
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

    def matrices(self, config: Config) -> dict[str, Sequence[Matrix]]:
        """The matrices of exactly the tensors that `config` implies; the output only if it is stored.

        Raises CheckpointError for a tensor that is missing, of another shape or unknown.
        """
        # Check before a list of this length is built: a hostile config.json may say millions.
        if config.block_count > len(self._files):
            raise CheckpointError(
                f"{self._folder}: config.json says num_hidden_layers {config.block_count}, "
                f"but there are only {len(self._files)} tensors; download the whole checkpoint"
            )
        matrices: dict[str, Sequence[Matrix]] = {}
        tied = OTHER_NAMES[Role.OUTPUT] not in self
        for name, tensor in config.tensors(tied=tied).items():
            role, shape, layer = tensor.role, config.shape(tensor), name.removeprefix("blk.").partition(".")[0]
            if role in OTHER_NAMES:
                matrices[name] = [self._matrix(OTHER_NAMES[role], shape)]
            elif role in BLOCK_NAMES:
                matrices[name] = [self._matrix(f"model.layers.{layer}.{BLOCK_NAMES[role]}", shape)]
            else:
                matrices[name] = self._moe_matrices(f"model.layers.{layer}", role, shape)
        for name in self._files:
            if name not in self._used and not DERIVED.fullmatch(name):
                raise CheckpointError(
                    f"{self._files[name].path}: tensor {quoted(name)} is not part of a {config.architecture.name} with "
                    f"{config.block_count} layers and {config.expert_count} experts"
                )
        return matrices

    def _moe_matrices(self, prefix: str, role: Role, shape: tuple[int, ...]) -> list[Matrix]:
        """The router or one of the three expert stacks [E, rows, width] of a layer, in either layout."""
        fused = f"{prefix}.mlp.gate.weight" in self
        if role is Role.ROUTER:
            return [self._matrix(f"{prefix}.{'mlp' if fused else 'block_sparse_moe'}.gate.weight", shape)]
        E, rows, width = shape
        if not fused:
            experts, letter = f"{prefix}.block_sparse_moe.experts", EXPERT_LETTERS[role]
            return [self._matrix(f"{experts}.{expert}.{letter}.weight", (rows, width)) for expert in range(E)]
        if role is Role.DOWN:
            file, stored = self._find(f"{prefix}.mlp.experts.down_proj", shape)
            return [Matrix(file, stored, expert * rows, rows) for expert in range(E)]
        file, stored = self._find(f"{prefix}.mlp.experts.gate_up_proj", (E, 2 * rows, width))
        first = rows if role is Role.UP else 0
        return [Matrix(file, stored, expert * 2 * rows + first, rows) for expert in range(E)]

    def _matrix(self, name: str, shape: tuple[int, ...]) -> Matrix:
        file, stored = self._find(name, shape)
        return Matrix(file, stored, 0, 1 if len(shape) == 1 else shape[0])

    def _require(self, name: str) -> WeightFile:
        if name not in self._files:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing; download the whole checkpoint")
        return self._files[name]

    def _find(self, name: str, shape: tuple[int, ...]) -> tuple[WeightFile, StoredTensor]:
        file = self._require(name)
        stored = file.tensors[name]
        if stored.dtype not in DTYPES:
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


def _model_name(folder: Path) -> str:
    """The folder's name; NAME in the Hugging Face hub's cache (models--ORG--NAME/snapshots/HASH)."""
    snapshots = folder.parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        return _text(snapshots.parent.name.rpartition("--")[2] or folder.name)
    return _text(folder.name)


def _text(name: str) -> str:
    """A file's name with U+FFFD for each byte that is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def _resolve_tie(
    declared: bool, output: Sequence[Matrix] | None, embedding: Sequence[Matrix]
) -> tuple[bool, list[str]]:
    """Whether the output is tied, decided as in transformers, and warnings; `declared`: config.json says it is."""
    if not declared:
        if output is None:
            raise CheckpointError(
                "tensor lm_head.weight is missing, and config.json does not say tie_word_embeddings; "
                "download the whole checkpoint"
            )
        return False, []
    if output is None or _same_bits(output[0], embedding[0]):
        return True, []
    return False, [
        "config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight: "
        "both are converted, as transformers loads both"
    ]


def _same_bits(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices of one shape hold the same bits."""
    if one.stored.dtype != other.stored.dtype:
        return False
    for start in range(0, one.count, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, one.count)
        if not np.array_equal(one.rows(start, stop).view(np.uint8), other.rows(start, stop).view(np.uint8)):
            return False
    return True
