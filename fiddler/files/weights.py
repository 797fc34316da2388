"""A model file's weights as views of the mapping, with the kernel variant that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fiddler.files.model_file import ModelFile
from fiddler.kernels import ExpertFfn, ExpertMatrices, KernelVariant, Tier
from fiddler.kernels.formats import FORMATS, format_of
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.models.architecture import EXPERT_BIASES, EXPERTS, Activation, Role

__all__ = [
    "ExpertWeights",
    "LinearWeight",
    "expert_matrices",
    "main_variant",
    "mapped_experts",
    "mean_expert_bytes",
    "variant_for",
]


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts, stored as the file has them, and the kernel variants that read them."""

    gate: ExpertMatrices  # [E, F, D], in elements of its format
    up: ExpertMatrices  # [E, F, D]
    down: ExpertMatrices  # [E, D, F]
    variant: KernelVariant  # of gate
    others: tuple[KernelVariant, KernelVariant] | None = None  # of up and down; None: as of gate
    activation: Activation = Activation.SILU

    @property
    def variants(self) -> tuple[KernelVariant, KernelVariant, KernelVariant]:
        """The kernel variants of gate, up and down."""
        return (self.variant, *(self.others or (self.variant, self.variant)))

    @cached_property
    def format(self) -> WeightFormat:
        """How gate is stored."""
        return format_of(self.variant)

    @cached_property
    def formats(self) -> frozenset[WeightFormat]:
        """How the three are stored."""
        return frozenset(format_of(each) for each in self.variants)

    @cached_property
    def matrix_formats(self) -> tuple[WeightFormat, WeightFormat, WeightFormat]:
        """How gate, up and down are stored."""
        of_gate, of_up, of_down = (format_of(each) for each in self.variants)
        return of_gate, of_up, of_down

    @property
    def quantised(self) -> bool:
        """Whether its weights lie in blocks with scales."""
        return self.variant.quantised

    @property
    def clamped(self) -> bool:
        """Whether the activation is `Activation.CLAMPED`."""
        return self.activation is Activation.CLAMPED

    def ffn(self, *, down_bias: bool = True) -> ExpertFfn:
        """The CPU's kernels with these weights. down_bias: False leaves adding the biases of down to others."""
        down = self.down
        if down.bias is not None and not down_bias:
            down = replace(down, bias=np.zeros(down.bias.shape, np.float32))
        return ExpertFfn(self.gate, self.up, down, self.variants, clamped=self.clamped)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """E, F and D."""
        experts, hidden, _ = self.gate.shape
        return experts, hidden, self.down.shape[1]

    @cached_property
    def split_rows(self) -> int:
        """An expert may be split after a multiple of so many hidden rows: a block of down."""
        return self.matrix_formats[2].block_length

    @cached_property
    def expert_bytes(self) -> int:
        """Size of one expert [bytes]."""
        return sum(matrices.expert_bytes for matrices in (self.gate, self.up, self.down))

    @cached_property
    def hidden_row_bytes(self) -> int:
        """An expert's size for each of its F hidden rows [bytes], rounded up: rows of gate and up, a column of down."""
        return -(-self.expert_bytes // self.gate.shape[1])


@dataclass(frozen=True)
class LinearWeight:
    """One dense weight, stored as the file has it, [out, in] or [heads, out, in], and its kernel variant."""

    bits: np.ndarray
    variant: KernelVariant

    @property
    def format(self) -> WeightFormat:
        """How the weights are stored."""
        return format_of(self.variant)


def mapped_experts(model_file: ModelFile, tier: Tier, *, exact: bool) -> list[ExpertWeights]:
    """The experts of every layer that has some; `exact`: float32 activations for all types."""
    experts = []
    for layer in model_file.config.sparse_layers:
        (gate, up, down), kinds = expert_matrices(model_file, layer)
        of_gate, *others = (variant_for(tier, kind, exact) for kind in kinds)
        same = all(each == of_gate for each in others)
        pair, activation = None if same else (others[0], others[1]), model_file.config.architecture.activation
        experts.append(ExpertWeights(gate, up, down, of_gate, pair, activation))
    return experts


def mean_expert_bytes(layers: Sequence[ExpertWeights]) -> int:
    """Size of an expert [bytes], rounded up; the mean where layers are stored differently. 0 without layers."""
    return -(-sum(weights.expert_bytes for weights in layers) // max(1, len(layers)))


def expert_matrices(
    model_file: ModelFile, layer: int
) -> tuple[tuple[ExpertMatrices, ExpertMatrices, ExpertMatrices], tuple[str, str, str]]:
    """gate, up [E, F, D] and down [E, D, F] of a layer, with their biases, and their GGUF types."""
    names = [model_file.config.architecture.tensor_name(role, layer) for role in EXPERTS]
    matrices = [ExpertMatrices.of(model_file.experts(name)) for name in names]
    if model_file.config.has(Role.GATE_BIAS):
        biases = (model_file.config.architecture.tensor_name(role, layer) for role in EXPERT_BIASES)
        matrices = [replace(each, bias=_floats(model_file, name)) for each, name in zip(matrices, biases, strict=True)]
    gate, up, down = matrices
    of_gate, of_up, of_down = (model_file.stored(name)[0].type for name in names)
    return (gate, up, down), (of_gate, of_up, of_down)


def _floats(model_file: ModelFile, name: str) -> np.ndarray:
    """A tensor as float32: a view of the mapping where it has that type."""
    values, kind = model_file.bits(name)
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.view(np.float16).astype(np.float32) if kind == "F16" else values


def variant_for(tier: Tier, kind: str, exact: bool) -> KernelVariant:
    """The kernel variant for weights of a GGUF type; `exact`: float32 activations for all."""
    weight_format = FORMATS[kind.lower()]
    return KernelVariant(tier, weight_format.name, "f32" if exact else weight_format.partner)


def main_variant(model_file: ModelFile, tier: Tier, *, exact: bool) -> KernelVariant | None:
    """The kernel variant of the first experts; without experts, of the first feed-forward. None: unknown weights."""
    config = model_file.config
    role, layer = (Role.GATE, config.sparse_layers[0]) if config.sparse_layers else (Role.DENSE_GATE, 0)
    kind = model_file.stored(config.architecture.tensor_name(role, layer))[0].type
    return variant_for(tier, kind, exact) if kind.lower() in FORMATS else None
