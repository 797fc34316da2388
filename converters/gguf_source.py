"""A GGUF as a source of conversion: its tensors in float32, float16 or bfloat16, its metadata as it is.

Stacks the experts of files from before April 2024, which hold one tensor an expert (`blk.N.ffn_gate.E.weight`). Rows of
queries and keys stay in GGUF's order. Changes no value; does not know where the weights are written to.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from fiddler.converters.checkpoint import Dtype
from fiddler.converters.safetensors_file import Array
from fiddler.errors import CheckpointError, FileFormatError, quoted
from fiddler.files.gguf_file import GgufFile, TensorInfo
from fiddler.files.stored_tensors import stored_names
from fiddler.models.architecture import Role
from fiddler.models.config import Config
from fiddler.models.metadata import further_tensors, read_config
from fiddler.text.vocabulary import TokenTable

__all__ = ["GgufMatrix", "GgufSource"]

_REWRITTEN = "general.architecture", "general.file_type", "general.quantization_version", "general.alignment"
_VIEWS = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class GgufMatrix:
    """All rows [count, width] of one tensor of the file; a vector is one row."""

    file: GgufFile
    info: TensorInfo

    @property
    def count(self) -> int:
        return math.prod(self.info.shape[:-1])

    @property
    def width(self) -> int:
        return self.info.shape[-1]

    def rows(self, start: int, stop: int) -> Array:
        """Rows `start` to `stop`; bfloat16 as uint16 bits. Raises FileFormatError where the file was cut short."""
        return self.file.rows(self.info.name, start, stop).view(_VIEWS[self.info.type])


class GgufSource:
    """An opened GGUF; the same as `Checkpoint` for whoever writes the target."""

    interleaves = False
    warnings: tuple[str, ...] = ()

    def __init__(self, file: GgufFile, config: Config, tied: bool, sources: dict[str, tuple[str, ...]]) -> None:
        self.config = config
        self.tied = tied
        self._file = file
        self._sources = sources

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Open a GGUF, in one file or split.

        Raises FileFormatError for a file that is damaged or of an unknown architecture, CheckpointError for one that is
        quantised or whose tensors are not those that its metadata imply.
        """
        file = GgufFile.open(path)
        try:
            config = read_config(file.metadata, file.tensors)
            TokenTable.from_metadata(file.metadata)
        except FileFormatError as error:
            raise FileFormatError(f"{file.shown_path}: {error}") from None
        if config.block_count > len(file.tensors):
            raise CheckpointError(
                f"{file.shown_path}: block_count is {config.block_count}, but there are {len(file.tensors)} tensors"
            )
        tied = config.architecture.tensor_name(Role.OUTPUT) not in file.tensors
        return cls(file, config, tied, _sources(file, config, tied))

    @property
    def dtype(self) -> Dtype:
        """The 16-bit type of most weights, counted in bytes; bf16 for a float32 file."""
        bytes_of: Counter[str] = Counter()
        for info in self._file.tensors.values():
            bytes_of[info.type] += info.nbytes
        return "f16" if bytes_of.most_common(1)[0][0] == "F16" else "bf16"

    def packed(self, _name: str) -> bool:
        """As `Checkpoint.packed`: quantised files do not convert."""
        return False

    def matrices(self, name: str) -> Iterator[GgufMatrix]:
        """The matrices that, stacked by rows, make up the GGUF tensor `name` (a vector is one row)."""
        for source in self._sources[name]:
            yield GgufMatrix(self._file, self._file.tensors[source])

    def write_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Add every key of the file, with its type, but those that the target has of its own.

        The target has no blocks that predict further tokens.
        """
        prefix = self.config.architecture.gguf_name
        for key, value in self._file.metadata.items():
            if (
                key in _REWRITTEN
                or key.startswith(("split.", "quantize.imatrix."))
                or key == f"{prefix}.nextn_predict_layers"
            ):
                continue
            if key == f"{prefix}.block_count":
                value = self.config.block_count
            kind, element = map(gguf.GGUFValueType, self._file.value_types[key])
            if isinstance(value, np.ndarray):
                value = value.tolist()
            writer.add_key_value(key, value, kind, sub_type=element if kind == gguf.GGUFValueType.ARRAY else None)


def _sources(file: GgufFile, config: Config, tied: bool) -> dict[str, tuple[str, ...]]:
    """Of each tensor of the model, the tensors of the file that hold it; raises CheckpointError for any other."""
    tensors = config.tensors(tied=tied)
    try:
        sources = stored_names(config, file.tensors, tied=tied)
    except FileFormatError as error:
        raise FileFormatError(f"{file.shown_path}: {error}") from None
    for name, names in sources.items():
        whole = config.shape(tensors[name])
        for source in names:
            info, shape = file.tensors.get(source), whole if source == name else whole[1:]
            if info is None:
                raise CheckpointError(f"{file.shown_path}: tensor {source} is missing; download the file again")
            if not info.has_shape(shape):
                raise CheckpointError(
                    f"{file.shown_path}: tensor {source} has shape {list(info.shape)}, the metadata imply {list(shape)}"
                )
            if info.type not in _VIEWS:
                raise CheckpointError(
                    f"{file.shown_path}: tensor {source} is {info.type}, a quantised or unusual type; "
                    "convert the original bf16, f16 or f32 model"
                )
    used = {source for names in sources.values() for source in names}
    for source in file.tensors.keys() - further_tensors(file.metadata, file.tensors):
        if source not in used:
            raise CheckpointError(
                f"{file.shown_path}: tensor {quoted(source)} is not part of a {config.architecture.name}; "
                "this variant does not convert"
            )
    return sources
