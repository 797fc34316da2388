"""A validated GGUF model: its hyper-parameters, tensors and vocabulary agree. Opening needs no torch or tensor data.

Knows which tensors its architecture declares, and its vocabulary; not how to compute with them or to tokenize text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.files.gguf_file import GgufFile, TensorInfo
from fiddler.files.gguf_header import VIEW_TYPES, Header
from fiddler.files.stored_tensors import stored_names
from fiddler.models.architecture import EXPERTS, ROPE_DIVISORS, Role
from fiddler.models.config import Config
from fiddler.models.metadata import further_tensors, read_config
from fiddler.models.rope_scaling import RopeKind
from fiddler.text.vocabulary import TokenTable

if TYPE_CHECKING:
    from fiddler.text.tokenizer import Tokenizer

__all__ = ["ModelFile", "check_header"]

_PLAIN = frozenset(name for name, _ in VIEW_TYPES.values())
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
        return cls.of(GgufFile.open(path))

    @classmethod
    def of(cls, file: GgufFile) -> ModelFile:
        """Check an opened file; see `open`."""
        try:
            config, tied = _checked(file.metadata, file.tensors)
            if (scaling := config.rope_scaling) is not None and scaling.kind is RopeKind.DIVISORS:
                config = replace(config, rope_scaling=replace(scaling, divisors=_numbers(file, ROPE_DIVISORS.name)))
        except FileFormatError as error:
            raise FileFormatError(f"{file.shown_path}: {error}") from None
        return cls(file, config, tied)

    def check_runnable(self) -> None:
        """Raise FileFormatError unless the kernels read every weight's type."""
        from fiddler.kernels.formats import FORMATS  # late: inspecting a file needs no kernels

        for name, names in self._stored.items():
            for each in names:
                kind = self.file.tensors[each].type
                if kind.lower() not in FORMATS:
                    raise FileFormatError(
                        f"{self.file.shown_path}: tensor {each} is {kind}, which does not run; use a file of "
                        f"{', '.join(FORMATS).upper()}, or make one from the original with `fiddler convert`"
                    )
            kinds = {tensor.type for tensor in self.stored(name)}
            if len(kinds) > 1:
                raise FileFormatError(
                    f"{self.file.shown_path}: the experts of {name} mix {' and '.join(sorted(kinds))}; "
                    f"`fiddler convert {self.file.shown_path} OUT.gguf --dtype bf16` gives them one type"
                )

    @cached_property
    def gpu_obstacle(self) -> str | None:
        """Why the model runs on the CPU only, in a few words; None where a GPU can run it."""
        from fiddler.kernels.formats import GPU_FORMATS  # late: inspecting a file needs no kernels

        for name, tensor in self.config.tensors(tied=self.tied).items():
            kind = self.stored(name)[0].type
            if kind not in _PLAIN and kind.lower() not in GPU_FORMATS:
                return f"{kind} weights run on the CPU only"
            if kind == "F32" and tensor.role in EXPERTS:
                return "F32 experts run on the CPU only"
        for layer in self.config.sparse_layers:
            names = [self.config.architecture.tensor_name(role, layer) for role in EXPERTS]
            kinds = {self.stored(name)[0].type for name in names}
            if len(kinds) > 1 and kinds & _PLAIN:
                mixed = " and ".join(sorted(kinds))
                return f"the experts of layer {layer} mix {mixed}, which run on the CPU only"
        return None

    @cached_property
    def quantised(self) -> bool:
        """Whether some weights lie in blocks with scales."""
        return any(tensor.type not in _PLAIN for tensor in self.file.tensors.values())

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
            plain = tensor.type in _PLAIN
            flat = (self.file.array(tensor.name) if plain else self.file.stored(tensor.name)).reshape(-1)
            for sample in range(_SAMPLES):
                begin = (flat.size - 1) * sample // (_SAMPLES - 1)
                sha256.update(flat[begin : begin + _SAMPLE_SIZE].tobytes())
        return sha256.digest()

    def bits(self, name: str) -> tuple[np.ndarray, str]:
        """A tensor's view and its type, in the shape that the hyper-parameters imply.

        float32 for F32, uint16 bits for F16 and BF16, of other types uint8 blocks with a row's bytes as last dimension.
        A tied model's output matrix is its embedding. Experts may be stored in another way: see `experts`.
        """
        architecture = self.config.architecture
        if self.tied and name == architecture.tensor_name(Role.OUTPUT):
            name = architecture.tensor_name(Role.TOKEN_EMBEDDING)
        return self._values(name, self._shapes[name]), self.file.tensors[name].type

    def _values(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if self.file.tensors[name].type in _PLAIN:
            return self.file.array(name).reshape(shape)
        return self.file.stored(name).reshape(*shape[:-1], -1)

    def experts(self, name: str) -> np.ndarray | list[np.ndarray]:
        """Views of a stack of experts [E, rows, columns], or of each one where the file has a tensor an expert."""
        if not self.single_experts:
            return self.bits(name)[0]
        return [self._values(each, self._shapes[name][1:]) for each in self._stored[name]]

    def stored(self, name: str) -> list[TensorInfo]:
        """The tensors of the file that hold a tensor of the model: one, or one an expert of a stack."""
        return [self.file.tensors[each] for each in self._stored[name]]

    @cached_property
    def single_experts(self) -> bool:
        """Whether the file has a tensor an expert, as those from before April 2024."""
        return any(names != (name,) for name, names in self._stored.items())

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.config.shape(tensor) for name, tensor in self.config.tensors(tied=self.tied).items()}

    @cached_property
    def _stored(self) -> dict[str, tuple[str, ...]]:
        return stored_names(self.config, self.file.tensors, tied=self.tied)


def _numbers(file: GgufFile, name: str) -> tuple[float, ...]:
    """The numbers in a float32 tensor of the file; raises FileFormatError where it has another type."""
    if file.tensors[name].type != "F32":
        raise FileFormatError(f"tensor {name} is {file.tensors[name].type}; it must be F32")
    return tuple(file.array(name).reshape(-1).tolist())


def check_header(header: bytes, nbytes: int) -> None:
    """Raise FileFormatError unless a file of `nbytes` bytes that begins with `header` is a model with a tokenizer.

    For the writer of a file, before it writes: `ModelFile.open` and its `tokenizer` do the same.
    """
    from fiddler.text.tokenizer import Tokenizer  # late, as above

    parsed = Header.parse(header, size=nbytes)
    _checked(parsed.metadata, {tensor.name: tensor for tensor in parsed.tensors})
    Tokenizer.from_metadata(parsed.metadata)


def _checked(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> tuple[Config, bool]:
    """The hyper-parameters that these tensors and this vocabulary agree with, and whether the output is tied."""
    config = read_config(metadata, tensors)
    tied = config.architecture.tensor_name(Role.OUTPUT) not in tensors
    further = further_tensors(metadata, tensors)
    _check_shapes({name: tensor for name, tensor in tensors.items() if name not in further}, config, tied)
    _check_vocabulary(metadata, config)
    return config, tied


def _check_shapes(tensors: Mapping[str, TensorInfo], config: Config, tied: bool) -> None:
    if config.block_count > len(tensors):
        raise FileFormatError(f"block_count is {config.block_count}, but there are only {len(tensors)} tensors")
    expected, stored = config.tensors(tied=tied), stored_names(config, tensors, tied=tied)
    for name, names in stored.items():
        shape = config.shape(expected[name])
        for each in names:
            info, own = tensors.get(each), shape if each == name else shape[1:]
            if info is None:
                raise FileFormatError(f"tensor {each} is missing; convert the model again")
            if not info.has_shape(own):
                raise FileFormatError(f"tensor {each} has shape {info.shape}, the metadata imply {own}")
    known = {each for names in stored.values() for each in names}
    for name in tensors:
        if name not in known:
            raise FileFormatError(
                f"tensor {name} is not part of a {config.architecture.name}; this variant does not run"
            )


def _check_vocabulary(metadata: Mapping[str, object], config: Config) -> None:
    count = len(TokenTable.from_metadata(metadata).texts)
    if count != config.vocab_size:
        key = f"{config.architecture.gguf_name}.vocab_size"
        raise FileFormatError(
            f"tokenizer.ggml.tokens holds {count} tokens, {key} says {config.vocab_size}; convert the model again"
        )
