"""The weight files of a Hugging Face folder, by transformers' precedence: safetensors, else PyTorch's `.bin`.

Knows file names and indices; does not know the containers or what the tensors are for.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Protocol

from fiddler.converters.json_object import read_object
from fiddler.converters.pytorch_file import PytorchFile
from fiddler.converters.safetensors_file import Array, SafetensorsFile, StoredTensor
from fiddler.converters.source_folder import missing_weights
from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import present

__all__ = ["WeightFile", "open_weights"]


class WeightFile(Protocol):
    """A file of tensors: `tensors` by name, and rows [count, last dimension] of one of them."""

    path: Path
    tensors: dict[str, StoredTensor]

    def rows(self, stored: StoredTensor, first: int, count: int) -> Array: ...


def open_weights(folder: Path) -> list[WeightFile]:
    """The folder's weight files, by transformers' precedence."""
    for single, kind in (("model.safetensors", SafetensorsFile), ("pytorch_model.bin", PytorchFile)):
        index = folder / f"{single}.index.json"
        if present(folder / single):
            return [kind(folder / single)]
        if present(index):
            return _shards(index, kind)
    raise missing_weights(folder)


def _shards(index: Path, kind: type[SafetensorsFile] | type[PytorchFile]) -> list[WeightFile]:
    weight_map = read_object(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is {quoted(weight_map, 40)}; download the file again")
    names = sorted({_shard_name(shard, index, kind) for shard in weight_map.values()})
    files: list[WeightFile] = [kind(index.parent / name) for name in names]
    tensors = {file.path.name: file.tensors for file in files}
    for name, shard in weight_map.items():
        if name not in tensors[shard]:
            raise CheckpointError(f"{index} says that tensor {quoted(name)} is in {shard}; it is not there")
    return files


def _shard_name(name: object, index: Path, kind: type[SafetensorsFile] | type[PytorchFile]) -> str:
    """A shard's file name, never a path: an untrusted index must not reach out of its folder."""
    suffix = "safetensors" if kind is SafetensorsFile else "bin"
    if not isinstance(name, str) or not re.fullmatch(rf"[\w.-]+\.{suffix}", name):
        raise CheckpointError(f"{index}: {quoted(name)} is not the name of a {suffix} file in this folder")
    return name
