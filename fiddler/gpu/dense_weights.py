"""Loads dense weights into the GPU's memory. Knows the file and the weight copy; not the budget."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.device.weight_copy import WeightCopy
from fiddler.files.model_file import ModelFile
from fiddler.models.architecture import FLOATS, Role
from fiddler.models.config import Config
from fiddler.models.latent_attention import per_head_matrices

__all__ = ["load_dense", "warm_up"]


def load_dense(model_file: ModelFile, weight_copy: WeightCopy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything but experts, on the GPU: the tensors of `Transformer`, and the weights of `GpuLinear`, by name.

    The tensors of `Transformer` are float32, except the embeddings, which keep the file's type as linears do.
    """
    weights: dict[str, Tensor] = {}
    linears: dict[str, Tensor] = {}
    config, name_of = model_file.config, model_file.config.architecture.tensor_name
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def load(name: str, into: Tensor | None = None) -> Tensor:
        values, kind = model_file.bits(name)
        target = torch.empty(values.shape, dtype=kinds[kind], device=weight_copy.device) if into is None else into
        weight_copy.copy(target.data_ptr(), values.ctypes.data, values.nbytes)
        return target

    embedding, output = name_of(Role.TOKEN_EMBEDDING), name_of(Role.OUTPUT)
    weights[embedding] = load(embedding)
    for name, tensor in config.tensors(tied=model_file.tied).items():
        if tensor.role in FLOATS:
            weights[name] = load(name)
    linears[output] = weights[embedding] if model_file.tied else load(output)
    for names in _products(config):
        mapped = [model_file.bits(name) for name in names]
        if (
            len(names) > 1 and len({kind for _, kind in mapped}) == 1
        ):  # contiguous: one product computes q, k and v, or gate and up
            rows = [len(values) for values, _ in mapped]
            columns = mapped[0][0].shape[1]
            joined = torch.empty(sum(rows), columns, dtype=kinds[mapped[0][1]], device=weight_copy.device)
            for name, part in zip(names, joined.split(rows), strict=True):
                linears[name] = load(name, part)
        else:
            linears.update({name: load(name) for name in names})
    if config.has(Role.KEY_VALUE_UP):
        for layer in range(config.block_count):
            linears |= per_head_matrices(config, layer, linears.pop(name_of(Role.KEY_VALUE_UP, layer)))
    arrived = weight_copy.event()
    weight_copy.arrive(arrived)
    arrived.synchronize()
    for name, values in weights.items():
        if name != embedding:
            weights[name] = values.float()
    return weights, linears


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
