"""Builds the CPU runner, whose kernels read weights in the mapped file. Knows files and kernels; not how steps run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cpu.layers import CpuExperts, CpuLinear, rms_norm, route
from fiddler.cpu.runner import CpuRunner
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, LinearWeight, variant_for
from fiddler.kernels.precompile import COMPILING
from fiddler.models.mixtral import Mixtral
from fiddler.models.rotary import rotary_frequencies
from fiddler.runtime.runner import Runner
from fiddler.telemetry.recorder import Recorder

__all__ = ["decoder_of", "on_cpu"]


def on_cpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    threads: int,
    context: int,
    exact: bool,
    notify: Callable[[str], None],
    recorder: Recorder,
) -> Runner:
    """A runner for the whole model on the CPU. Calls `notify` with one line where kernels must be compiled first."""
    config, tier = model_file.config, experts[0].variant.tier
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
            weight = _tensor(values, kind) if kind == "F32" else LinearWeight(values, variant_for(tier, kind, exact))
            linears[name] = weight
    model = Mixtral(config, weights, CpuLinear(linears, recorder), CpuExperts(list(experts), recorder), route, rms_norm)
    decoder = decoder_of(model, weights, linears, experts)
    for variant in {weight.variant for weight in linears.values() if isinstance(weight, LinearWeight)}:
        kernels.precompile(variant, lambda: notify(COMPILING), decode=decoder is not None)
    cache_dtype = torch.float16 if experts[0].variant.activations == "bf16" else torch.float32
    return CpuRunner(model, context, cache_dtype, threads, decoder, recorder)


def _tensor(values: np.ndarray, kind: str) -> Tensor:
    """A torch tensor over the mapped memory of `values`, whose GGUF type is `kind`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
        tensor = torch.from_numpy(values)
    return tensor.view({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])


def decoder_of(
    model: Mixtral,
    weights: Mapping[str, Tensor],
    linears: Mapping[str, LinearWeight | Tensor],
    experts: Sequence[ExpertWeights],
) -> kernels.CompiledDecodeStep | None:
    """The compiled decode step of this model; None where its weights do not all have the same kernel variant."""
    config, variant, bits = model.config, experts[0].variant, {}
    for name, weight in linears.items():
        if not isinstance(weight, LinearWeight) or weight.variant != variant:
            return None
        bits[name] = weight.bits
    if any(expert.variant != variant for expert in experts):
        return None
    table = weights["token_embd.weight"]
    rows = table.view(torch.uint16).numpy() if table.dtype == torch.bfloat16 else table.numpy()
    blocks = []
    for layer, expert in enumerate(experts):
        small = {
            part: weights[f"blk.{layer}.{part}.weight"].numpy() for part in ("attn_norm", "ffn_norm", "ffn_gate_inp")
        }
        dense = {f"attn_{part}": bits[f"blk.{layer}.attn_{part}.weight"] for part in ("q", "k", "v", "output")}
        blocks.append(kernels.BlockWeights(**small, **dense, gate=expert.gate, up=expert.up, down=expert.down))
    return kernels.CompiledDecodeStep(
        rows,
        blocks,
        weights["output_norm.weight"].numpy(),
        bits["output.weight"],
        variant,
        rotary_frequencies(config, torch.device("cpu")).numpy(),
        config.rms_epsilon,
        config.expert_used_count,
        config.sliding_window,
    )
