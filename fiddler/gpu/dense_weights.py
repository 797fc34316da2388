"""Loads dense weights into the GPU's memory, as the file has them. Knows the file and the weight copy; not the budget.

Quantised ones stay so, but for small tensors that are float32 in memory, and heads' matrices of latent attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.device.weight_copy import WeightCopy
from fiddler.files.model_file import ModelFile
from fiddler.kernels.formats import FORMATS
from fiddler.models.architecture import EXPERT_BIASES, FLOATS, Role
from fiddler.models.config import Config
from fiddler.models.interfaces import Embeddings
from fiddler.models.latent_attention import per_head_matrices
from fiddler.offload.feed_forward import Matrix
from fiddler.offload.stored_matrix import StoredMatrix

__all__ = ["DenseWeights", "decoded_bytes", "load_dense", "warm_up"]

_KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_PER_HEAD = (Role.KEY_UP, Role.VALUE_UP, Role.KEY_VALUE_UP)


class DenseWeights(NamedTuple):
    """Everything but experts and their biases, on the GPU, by name."""

    tensors: dict[str, Tensor]
    """Those of `Transformer`, but for the embeddings: float32."""
    linears: dict[str, Matrix]
    """Those of `GpuLinear`, in the file's types."""
    embeddings: Embeddings
    """In the file's type."""


class _Loader:
    """Copies tensors to the GPU; they are there once `wait` returns."""

    def __init__(self, model_file: ModelFile, weight_copy: WeightCopy) -> None:
        self._model_file, self._weight_copy = model_file, weight_copy

    def load(self, names: Sequence[str]) -> list[Matrix]:
        """Tensors; several of one type are contiguous: one product computes q, k and v, or gate and up."""
        mapped = [self._model_file.bits(name) for name in names]
        if len({kind for _, kind in mapped}) > 1:
            return [matrix for name in names for matrix in self.load([name])]
        rows, kind = [len(values) for values, _ in mapped], mapped[0][1]
        shape, dtype = (sum(rows), *mapped[0][0].shape[1:]), _KINDS.get(kind, torch.uint8)
        joined = torch.empty(shape, dtype=dtype, device=self._weight_copy.device)
        parts = joined.split(rows)
        for part, (values, _) in zip(parts, mapped, strict=True):
            self._weight_copy.copy(part.data_ptr(), values.ctypes.data, values.nbytes)
        return [part if kind in _KINDS else StoredMatrix(part, FORMATS[kind.lower()]) for part in parts]

    def wait(self) -> None:
        """Wait for the copies so far."""
        arrived = self._weight_copy.event()
        self._weight_copy.arrive(arrived)
        arrived.synchronize()


def load_dense(model_file: ModelFile, weight_copy: WeightCopy) -> DenseWeights:
    """Everything but experts and their biases, on the GPU."""
    config, name_of = model_file.config, model_file.config.architecture.tensor_name
    loader = _Loader(model_file, weight_copy)
    (embeddings,) = loader.load([name_of(Role.TOKEN_EMBEDDING)])
    tensors = config.tensors(tied=model_file.tied)
    roles = FLOATS - {*EXPERT_BIASES}
    floats = {name: loader.load([name])[0] for name, tensor in tensors.items() if tensor.role in roles}
    output = name_of(Role.OUTPUT)
    linears = {output: embeddings if model_file.tied else loader.load([output])[0]}
    for names in _products(config):
        linears.update(zip(names, loader.load(names), strict=True))
    loader.wait()
    for name, tensor in tensors.items():
        if tensor.role in _PER_HEAD:
            matrices = linears[name]
            linears[name] = matrices.decoded() if isinstance(matrices, StoredMatrix) else matrices
    if config.has(Role.KEY_VALUE_UP):
        for layer in range(config.block_count):
            both = linears.pop(name_of(Role.KEY_VALUE_UP, layer))
            assert isinstance(both, Tensor)
            linears |= per_head_matrices(config, layer, both)
    return DenseWeights({name: _floats(values) for name, values in floats.items()}, linears, embeddings)


def _floats(values: Matrix) -> Tensor:
    return values.decoded() if isinstance(values, StoredMatrix) else values.float()


def decoded_bytes(model_file: ModelFile) -> int:
    """GPU memory that decoding takes beyond the file's bytes: of what is not float32 there, and is in memory."""
    more = 0
    for name, tensor in model_file.config.tensors(tied=model_file.tied).items():
        stored = model_file.stored(name)[0]
        if stored.type != "F32" if tensor.role in FLOATS else tensor.role in _PER_HEAD and stored.type not in _KINDS:
            more += 4 * math.prod(stored.shape) - stored.nbytes
    return more


_TOGETHER = (  # roles whose products with the same input are one
    (Role.QUERY, Role.KEY, Role.VALUE),
    (Role.QUERY_KEY_VALUE,),
    (Role.QUERY, Role.LATENT),
    (Role.QUERY_DOWN, Role.LATENT),
    (Role.QUERY_UP,),
    (Role.KEY_UP,),
    (Role.VALUE_UP,),
    (Role.KEY_VALUE_UP,),
    (Role.ATTENTION_OUTPUT,),
    (Role.SHARED_GATE, Role.SHARED_UP),
    (Role.SHARED_DOWN,),
    (Role.DENSE_GATE, Role.DENSE_UP),
    (Role.DENSE_DOWN,),
)


def _products(config: Config) -> list[list[str]]:
    """The names of the blocks' linears, grouped as they are multiplied."""
    tensors, name_of = config.tensors(tied=False), config.architecture.tensor_name
    return [
        [name_of(role, layer) for role in roles]
        for layer in range(config.block_count)
        for roles in _TOGETHER
        if all(config.has(role) for role in roles) and name_of(roles[0], layer) in tensors
    ]


def warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Run torch's products and attention once: the driver loads their code, and the budget sees its memory."""
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 64, 512):
            F.linear(
                torch.zeros(tokens, 256, dtype=kind, device=device), torch.zeros(256, 256, dtype=kind, device=device)
            )
    q = torch.zeros(1, 8, 64, 64, dtype=dtype, device=device)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.cuda.synchronize(device)
