"""A model file's weights as the CPU's kernels take them: where they lie in the mapping. Knows files and kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cpu.layers import CpuExperts, CpuLinear, ExpertWeights, LinearWeight, rms_norm, route
from fiddler.cpu.runner import CpuRunner, decoder_of
from fiddler.files.model_file import ModelFile
from fiddler.kernels import Product, Tier
from fiddler.models.mixtral import Mixtral
from fiddler.runtime.runner import Runner
from fiddler.telemetry.recorder import Recorder

__all__ = ["COMPILING", "mapped_experts", "on_cpu"]

COMPILING = "compiling kernels for this CPU; the next start finds them on disk"


def mapped_experts(model_file: ModelFile, tier: Tier, *, exact: bool) -> list[ExpertWeights]:
    """Every layer's experts; `exact`: float32 activations for bf16 weights, too."""
    experts = []
    for layer in range(model_file.config.block_count):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        (gate, kind), (up, _), (down, _) = (model_file.bits(name) for name in names)
        experts.append(ExpertWeights(gate, up, down, _product(tier, kind, exact)))
    return experts


def on_cpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    threads: int,
    context: int,
    exact: bool,
    notify: Callable[[str], None],
    recorder: Recorder,
) -> Runner:
    """The whole model on the CPU."""
    config, tier = model_file.config, experts[0].product.tier
    linears: dict[str, LinearWeight | Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name in config.tensor_shapes(tied=False):
        if name.endswith("_exps.weight"):
            continue
        values, kind = model_file.bits(name)
        if name.endswith(("norm.weight", "ffn_gate_inp.weight")):
            weights[name] = _tensor(values, kind).float()
        elif name == "token_embd.weight":
            weights[name] = _tensor(values, kind)
        else:
            made = _tensor(values, kind) if kind == "F32" else LinearWeight(values, _product(tier, kind, exact))
            linears[name] = made
    model = Mixtral(config, weights, CpuLinear(linears, recorder), CpuExperts(list(experts), recorder), route, rms_norm)
    decoder = decoder_of(model, weights, linears, experts)
    for product in {weight.product for weight in linears.values() if isinstance(weight, LinearWeight)}:
        kernels.prepare(product, lambda: notify(COMPILING), decode=decoder is not None)
    cache_dtype = torch.float16 if experts[0].product.activations == "bf16" else torch.float32
    return CpuRunner(model, context, cache_dtype, threads, decoder, recorder)


def _product(tier: Tier, kind: str, exact: bool) -> Product:
    weights = "bf16" if kind == "BF16" else "f16"
    return Product(tier, weights, "f32" if exact or weights == "f16" else "bf16")


def _tensor(values: np.ndarray, kind: str) -> Tensor:
    """A torch tensor over the same memory as a view into the mapping."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
        tensor = torch.from_numpy(values)
    return tensor.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])
