"""Builds the CPU runner, whose kernels read weights in the mapped file. Knows files and kernels; not how steps run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.cpu.layers import CpuExperts, CpuLinear, EmbeddingRows, rms_norm, route, routing_of
from fiddler.cpu.runner import CpuRunner
from fiddler.cpu.step_timing import step_curve
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, LinearWeight, main_variant, variant_for
from fiddler.kernels import KernelVariant, Tier
from fiddler.kernels.formats import FORMATS
from fiddler.kernels.formats.block_format import BlockFormat
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.kernels.machine.cpu import cpu_model
from fiddler.load_options import LoadOptions
from fiddler.models import ARCHITECTURES, DENSE_ARCHITECTURES
from fiddler.models.architecture import (
    EXPERT_BIASES,
    EXPERTS,
    FLOATS,
    Activation,
    AttentionKind,
    Norm,
    Role,
    Rotary,
    Window,
    first_unknown,
)
from fiddler.models.config import Config
from fiddler.models.latent_attention import per_head_matrices
from fiddler.models.rotary import heads, rotary_frequencies
from fiddler.models.transformer import Transformer
from fiddler.runtime.block_pool import array_dtype
from fiddler.runtime.cache_type import cache_types
from fiddler.runtime.runner import Runner
from fiddler.telemetry.recorder import Recorder

__all__ = ["can_decode", "decoder_of", "on_cpu"]

# architectures whose parts the compiled decode step knows: all but latent attention
_DECODES = tuple(
    each for each in (*ARCHITECTURES.values(), *DENSE_ARCHITECTURES.values()) if each.attention is AttentionKind.HEADS
)
_TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# `BlockWeights`' names of a block's small tensors and matrices; biases and routed experts apart
_SMALL = {
    "attn_norm": Role.ATTENTION_NORM,
    "ffn_norm": Role.FFN_NORM,
    "ffn_gate_inp": Role.ROUTER,
    "q_norm": Role.QUERY_NORM,
    "k_norm": Role.KEY_NORM,
    "selection_bias": Role.SELECTION_BIAS,
    "shared_gate": Role.SHARED_ROUTER,
    "output_bias": Role.OUTPUT_BIAS,
    "sinks": Role.SINKS,
    "router_bias": Role.ROUTER_BIAS,
}
_MATRICES = {
    "attn_q": Role.QUERY,
    "attn_k": Role.KEY,
    "attn_v": Role.VALUE,
    "attn_output": Role.ATTENTION_OUTPUT,
}
# a dense layer's feed-forward, or the shared experts
_FEED_FORWARDS = (
    {"dense_gate": Role.DENSE_GATE, "dense_up": Role.DENSE_UP, "dense_down": Role.DENSE_DOWN},
    {"dense_gate": Role.SHARED_GATE, "dense_up": Role.SHARED_UP, "dense_down": Role.SHARED_DOWN},
)


def on_cpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    tier: Tier,
    threads: int,
    context: int,
    options: LoadOptions,
    notify: Callable[[str], None],
    recorder: Recorder,
) -> Runner:
    """A runner for the whole model on the CPU. Calls `notify` with one line where kernels must be compiled first."""
    exact = options.exact
    config, main = model_file.config, main_variant(model_file, tier, exact=exact)
    cache_dtype = cache_types(model_file, options.cache_type_k, main).stored
    linears: dict[str, LinearWeight | Tensor] = {}
    weights: dict[str, Tensor] = {}
    embeddings: kernels.StoredRows | None = None
    for name, tensor in config.tensors(tied=False).items():
        if tensor.role in EXPERTS or tensor.role in EXPERT_BIASES:
            continue
        values, kind = model_file.bits(name)
        if tensor.role is Role.TOKEN_EMBEDDING and kind not in _TORCH_TYPES:
            embeddings = kernels.StoredRows(values, kind.lower(), tier)
        elif tensor.role in FLOATS:
            weights[name] = _tensor(values, kind, tier).float()
        elif tensor.role is Role.TOKEN_EMBEDDING:
            weights[name] = _tensor(values, kind, tier)
        elif tensor.role is Role.KEY_VALUE_UP:
            linears |= per_head_matrices(config, int(name.split(".")[1]), _tensor(values, kind, tier))
        elif kind == "F32":
            linears[name] = _tensor(values, kind, tier)
        else:
            linears[name] = LinearWeight(values, variant_for(tier, kind, exact))
    linear, cpu_experts = CpuLinear(linears, recorder), CpuExperts(list(experts), recorder)
    table = None if embeddings is None else EmbeddingRows(embeddings)
    make_heads = partial(heads, norm=rms_norm)
    model = Transformer(config, weights, linear, cpu_experts, route, rms_norm, token_embd=table, make_heads=make_heads)
    variants = {weight.variant for weight in linears.values() if isinstance(weight, LinearWeight)}
    variants |= {variant for expert in experts for variant in expert.variants}
    decodes = main is not None and _decodes(config, linears, experts)
    kernels.precompile(variants, notify, decode=decodes, kv_dtype=array_dtype(cache_dtype))
    decoder = decoder_of(model, weights, linears, experts, main, embeddings) if main is not None and decodes else None
    silent = CpuLinear(linears), CpuExperts(list(experts)), route, rms_norm
    timed = Transformer(config, weights, *silent, token_embd=table, make_heads=make_heads)
    setup = _setup(config, threads, variants, cache_dtype)
    measure = partial(step_curve, model=timed, setup=setup, notify=notify)
    return CpuRunner(model, context, cache_dtype, threads, decoder, recorder, measure)


def _setup(config: Config, threads: int, variants: Collection[KernelVariant], cache_dtype: torch.dtype) -> str:
    """What the seconds of a step depend on, in one line: machine, kernels, and the model's shape."""
    kinds = sorted(f"{each.tier.name} {each.weights} {each.activations} {each.tuning.name}" for each in variants)
    values = {each.name: getattr(config, each.name) for each in dataclasses.fields(config)}
    shape = ", ".join(f"{name} {value}" for name, value in values.items() if isinstance(value, int | float))
    return f"{cpu_model()}, {threads} threads; {'; '.join(kinds)}; {cache_dtype}; {config.architecture.name}, {shape}"


def _tensor(values: np.ndarray, kind: str, tier: Tier) -> Tensor:
    """A torch tensor over the mapped memory of `values`, whose GGUF type is `kind`; quantised ones are decoded."""
    if kind not in _TORCH_TYPES:
        return torch.from_numpy(kernels.decode_stored(values, kind.lower(), tier))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot mark a tensor read-only; nothing writes to weights
        tensor = torch.from_numpy(values)
    return tensor.view(_TORCH_TYPES[kind])


def can_decode(config: Config, formats: Collection[WeightFormat]) -> bool:
    """Whether the compiled decode step runs a model whose matrices have these formats: one, or any quantised ones."""
    together = len(set(formats)) == 1 or all(isinstance(each, BlockFormat) for each in formats)
    known = together and all(FORMATS.get(each.name) is each for each in formats)
    whole = config.rotated_scale == 1.0 or config.rotated == config.head_dim  # else a part of each query is scaled
    return known and whole and first_unknown(config.architecture, _DECODES) is None


def _decodes(config: Config, linears: Mapping[str, LinearWeight | Tensor], experts: Sequence[ExpertWeights]) -> bool:
    """Whether the compiled decode step runs this model: `can_decode`, and no matrix is a tensor of torch's."""
    formats = {weight.format for weight in linears.values() if isinstance(weight, LinearWeight)}
    formats = formats.union(*(expert.formats for expert in experts))
    return not any(isinstance(weight, Tensor) for weight in linears.values()) and can_decode(config, formats)


def decoder_of(
    model: Transformer,
    weights: Mapping[str, Tensor],
    linears: Mapping[str, LinearWeight | Tensor],
    experts: Sequence[ExpertWeights],
    variant: KernelVariant,
    embeddings: kernels.StoredRows | None = None,
) -> kernels.CompiledDecodeStep | None:
    """The compiled decode step of this model; None where it does not run it.

    variant: of the experts, or of the feed-forwards of a model without any. embeddings: where they are quantised.
    """
    config, name = model.config, model.config.architecture.tensor_name
    mapped = {key: weight for key, weight in linears.items() if isinstance(weight, LinearWeight)}
    if not _decodes(config, linears, experts):
        return None
    rows: np.ndarray | kernels.StoredRows
    if embeddings is not None:
        rows = embeddings
    else:
        table = weights[name(Role.TOKEN_EMBEDDING)]
        rows = table.view(torch.uint16).numpy() if table.dtype == torch.bfloat16 else table.numpy()
    return kernels.CompiledDecodeStep(
        rows,
        [_block_weights(config, layer, weights, mapped, experts) for layer in range(config.block_count)],
        weights[name(Role.OUTPUT_NORM)].numpy(),
        mapped[name(Role.OUTPUT)].bits,
        variant,
        rotary_frequencies(config, torch.device("cpu")).numpy(),
        config.rms_epsilon,
        config.expert_used_count,
        config.sliding_window,
        _block_parts(config),
        mapped[name(Role.OUTPUT)].variant,
    )


def _block_weights(
    config: Config,
    layer: int,
    weights: Mapping[str, Tensor],
    linears: Mapping[str, LinearWeight],
    experts: Sequence[ExpertWeights],
) -> kernels.BlockWeights:
    """A block's weights under the kernels' names."""
    sparse = layer in config.sparse_layers
    roles = {tensor.role for tensor in config.architecture.block_tensors(dense=not sparse, absent=config.absent)}

    def tensor_name(role: Role) -> str:
        return config.architecture.tensor_name(role, layer)

    arrays = {field: weights[tensor_name(role)].numpy() for field, role in _SMALL.items() if role in roles}
    variants: dict[str, KernelVariant] = {}
    for fields in (_MATRICES, *_FEED_FORWARDS):
        mapped = {field: linears[tensor_name(role)] for field, role in fields.items() if role in roles}
        arrays |= {field: weight.bits for field, weight in mapped.items()}
        variants |= {field: weight.variant for field, weight in mapped.items()}
    if Role.QUERY_KEY_VALUE in roles:
        queries, keys = config.head_count * config.head_dim, config.head_count_kv * config.head_dim
        weight = linears[tensor_name(Role.QUERY_KEY_VALUE)]
        parts = np.split(weight.bits, (queries, queries + keys))
        arrays |= dict(zip(("attn_q", "attn_k", "attn_v"), parts, strict=True))
        variants |= dict.fromkeys(("attn_q", "attn_k", "attn_v"), weight.variant)
    if Role.QUERY_BIAS in roles:
        biases = (Role.QUERY_BIAS, Role.KEY_BIAS, Role.VALUE_BIAS)
        arrays["attn_bias"] = np.concatenate([weights[tensor_name(role)].numpy() for role in biases])
    if not sparse:
        return kernels.BlockWeights(**arrays, gate=None, up=None, down=None, variants=variants)
    expert = experts[layer - config.leading_dense_block_count]
    variants |= dict(zip(("gate", "up", "down"), expert.variants, strict=True))
    return kernels.BlockWeights(**arrays, gate=expert.gate, up=expert.up, down=expert.down, variants=variants)


def _block_parts(config: Config) -> kernels.BlockParts:
    """How the model's blocks compute, beside their weights."""
    rule, scale = config.router, config.attention_scale
    return kernels.BlockParts(
        routing=routing_of(rule),
        halves=config.rotated if config.architecture.rotary is Rotary.HALVES else 0,
        clamp=config.clamp_kqv or 0.0,
        query_scale=(1.0 if scale is None else scale * config.head_dim**0.5) * config.rotated_scale**2,
        residual_scale=config.residual_scale,
        embedding_scale=config.embedding_scale,
        logit_scale=config.logit_scale,
        layer_norm=config.architecture.norm is Norm.LAYER,
        clamped=config.architecture.activation is Activation.CLAMPED,
        every_second=config.architecture.window is Window.EVERY_SECOND,
    )
