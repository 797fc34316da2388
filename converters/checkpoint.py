"""A Hugging Face folder as a lazy source: locates the matrices of each GGUF tensor.

Knows the rules of tied embeddings; checks that the folder holds exactly the tensors that config.json implies, and
brings its tokenizer. Changes no value; does not know where the weights are written to.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import gguf
import numpy as np

from fiddler.converters.differences import differences
from fiddler.converters.hf_config import read_hf_config
from fiddler.converters.mxfp4 import PackedMatrix
from fiddler.converters.safetensors_file import DTYPES
from fiddler.converters.source_folder import check_folder
from fiddler.converters.tensor_lookup import Source, TensorLookup
from fiddler.converters.tokenizer.vocabulary import Vocabulary, read_vocabulary
from fiddler.converters.weight_files import WeightFile, open_weights
from fiddler.errors import CheckpointError
from fiddler.models.architecture import Role
from fiddler.models.config import Config
from fiddler.models.metadata import to_metadata

__all__ = ["Checkpoint", "Dtype", "Source", "WeightFile"]

Dtype: TypeAlias = Literal["bf16", "f16"]
_COMPARED_ROWS = 256


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
        matrices: Mapping[str, Sequence[Source]],
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
        or of a family that does not convert.
        """
        check_folder(folder)
        hf_config = read_hf_config(folder)
        lookup = TensorLookup(folder, open_weights(folder))
        matrices = lookup.matrices(hf_config.config, hf_config.family, hf_config.ignored_layers)
        name = hf_config.config.architecture.tensor_name
        output = matrices.get(name(Role.OUTPUT))
        tied, warnings = _resolve_tie(hf_config.tied, output, matrices[name(Role.TOKEN_EMBEDDING)])
        if tied and not hf_config.config.architecture.may_tie:
            tied = False
            matrices[name(Role.OUTPUT)] = matrices[name(Role.TOKEN_EMBEDDING)]
        if tied:
            matrices.pop(name(Role.OUTPUT), None)
        warnings += differences(hf_config.config)
        vocabulary = read_vocabulary(folder, hf_config.config.vocab_size)
        warnings += vocabulary.warnings
        return cls(_model_name(folder.resolve()), hf_config.config, tied, matrices, vocabulary, warnings)

    @property
    def dtype(self) -> Dtype:
        """The 16-bit type of most weights, counted in bytes; bf16 for a float32 checkpoint."""
        bytes_of: Counter[str] = Counter()
        for matrices in self._matrices.values():
            for matrix in matrices:
                if (stored := matrix.stored) is not None:
                    bytes_of[stored.dtype] += matrix.count * matrix.width * DTYPES[stored.dtype].itemsize
        return "f16" if bytes_of.most_common(1)[0][0] == "F16" else "bf16"

    def packed(self, name: str) -> bool:
        """Whether the GGUF tensor `name` is MXFP4 in the source."""
        return isinstance(self._matrices[name][0], PackedMatrix)

    def matrices(self, name: str) -> Iterator[Source]:
        """The matrices that, stacked by rows, make up the GGUF tensor `name` (a vector is one row)."""
        return iter(self._matrices[name])

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add the name, the hyper-parameters and the tokenizer."""
        writer.add_name(self.name)
        for key, value in to_metadata(self.config).items():
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_float32(key, value)
        self._vocabulary.write_to(writer)


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
    declared: bool, output: Sequence[Source] | None, embedding: Sequence[Source]
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


def _same_bits(one: Source, other: Source) -> bool:
    """Whether two matrices of one shape hold the same bits."""
    if one.stored is None or other.stored is None or one.stored.dtype != other.stored.dtype:
        return False
    for start in range(0, one.count, _COMPARED_ROWS):
        stop = min(start + _COMPARED_ROWS, one.count)
        if not np.array_equal(one.rows(start, stop).view(np.uint8), other.rows(start, stop).view(np.uint8)):
            return False
    return True
