"""A validated Mixtral GGUF: its hyper-parameters, tensors and vocabulary agree. Opening needs no torch or tensor data.

Knows which tensors and which vocabulary a Mixtral has; not how to compute with them or to tokenize text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.files.gguf_file import GgufFile
from fiddler.models.config import Config
from fiddler.text.vocabulary import TokenTable

if TYPE_CHECKING:
    from fiddler.text.tokenizer import Tokenizer

__all__ = ["ModelFile"]

_SAMPLES, _SAMPLE_SIZE = 8, 32  # samples of a tensor in the fingerprint, elements of a sample


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file whose tensor shapes and vocabulary size are those that its hyper-parameters imply."""

    file: GgufFile
    config: Config
    tied: bool  # `token_embd` is the output matrix, too

    @classmethod
    def open(cls, path: str | Path) -> ModelFile:
        """Map `path` and check its tensors and its vocabulary against its hyper-parameters.

        Raises FileFormatError, one line that names the file, for a malformed file, another architecture, a tensor
        that is missing, unknown or of another shape, and a vocabulary that is malformed or of another size.
        """
        file = GgufFile.open(path)
        try:
            config = Config.from_metadata(file.metadata)
            tied = "output.weight" not in file.tensors
            _check_shapes(file, config, tied)
            _check_vocabulary(file, config)
        except FileFormatError as error:
            raise FileFormatError(f"{file.shown_path}: {error}") from None
        return cls(file, config, tied)

    def check_runnable(self) -> None:
        """Raise FileFormatError unless the kernels read every weight's type and each layer's experts have one type."""
        from fiddler.kernels.formats import FORMATS  # late: inspecting a file needs no kernels

        for name in self.config.tensor_shapes(tied=self.tied):
            kind = self.file.tensors[name].type
            routed = name.endswith("_exps.weight")
            if kind.lower() in FORMATS or (kind == "F32" and not routed):
                continue
            raise FileFormatError(
                f"{self.file.shown_path}: tensor {name} is {kind}, which does not run; "
                "use an F16 or BF16 file, or convert the original checkpoint with `fiddler convert`"
            )
        for layer in range(self.config.block_count):
            kinds = {self.file.tensors[f"blk.{layer}.ffn_{part}_exps.weight"].type for part in ("gate", "up", "down")}
            if len(kinds) > 1:
                raise FileFormatError(
                    f"{self.file.shown_path}: the experts of layer {layer} mix {' and '.join(sorted(kinds))}; "
                    "convert the model again with one --dtype"
                )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file's vocabulary, built on first use.

        Raises FileFormatError, one line that names the file, if the vocabulary makes no tokenizer.
        """
        from fiddler.text.tokenizer import Tokenizer  # late: inspecting a file needs no sentencepiece

        try:
            return Tokenizer.from_metadata(self.file.metadata)
        except FileFormatError as error:
            raise FileFormatError(f"{self.file.shown_path}: {error}") from None

    @cached_property
    def fingerprint(self) -> bytes:
        """Identifies the model: SHA-256 [32 bytes] of its metadata, tensor shapes and samples of its weights.

        Reads some kilobytes of the mapping in all; weights that differ only elsewhere go unnoticed.
        """
        sha256 = hashlib.sha256()
        for key, value in self.file.metadata.items():
            if not key.startswith("split."):
                sha256.update(f"{key!a}={value!a};".encode())
                sha256.update(value.tobytes() if isinstance(value, np.ndarray) else b"")
        for tensor in self.file.tensors.values():
            sha256.update(f"{tensor.name!a} {tensor.type} {tensor.shape};".encode())
            flat = self.file.array(tensor.name).reshape(-1)
            for sample in range(_SAMPLES):
                begin = (flat.size - 1) * sample // (_SAMPLES - 1)
                sha256.update(flat[begin : begin + _SAMPLE_SIZE].tobytes())
        return sha256.digest()

    def bits(self, name: str) -> tuple[np.ndarray, str]:
        """A tensor's view (see `GgufFile.array`) and its type; a tied model's "output.weight" is its `token_embd`."""
        if name == "output.weight" and self.tied:
            name = "token_embd.weight"
        return self.file.array(name), self.file.tensors[name].type


def _check_shapes(file: GgufFile, config: Config, tied: bool) -> None:
    if config.block_count > len(file.tensors):
        raise FileFormatError(f"block_count is {config.block_count}, but there are only {len(file.tensors)} tensors")
    expected = config.tensor_shapes(tied=tied)
    old = next((name for name in file.tensors if ".ffn_gate.0." in name or ".ffn_up.0." in name), None)
    if old is not None:
        raise FileFormatError(
            f"tensor {old} is one expert by itself, a layout from before 2024; convert the original checkpoint again"
        )
    for name, shape in expected.items():
        info = file.tensors.get(name)
        if info is None:
            raise FileFormatError(f"tensor {name} is missing; convert the model again")
        if info.shape != shape:
            raise FileFormatError(f"tensor {name} has shape {info.shape}, the metadata imply {shape}")
    for name in file.tensors:
        if name not in expected:
            raise FileFormatError(f"tensor {name} is not part of a Mixtral; this variant does not run")


def _check_vocabulary(file: GgufFile, config: Config) -> None:
    count = len(TokenTable.from_metadata(file.metadata).texts)
    if count != config.vocab_size:
        raise FileFormatError(
            f"tokenizer.ggml.tokens holds {count} tokens, llama.vocab_size says {config.vocab_size}; "
            "convert the model again"
        )
