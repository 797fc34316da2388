"""A model file's weights as views of the mapping, with the kernel variant that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fiddler.files.model_file import ModelFile
from fiddler.kernels import ExpertMatrices, KernelVariant, Tier
from fiddler.kernels.formats import FORMATS, format_of
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.models.architecture import EXPERTS, Role

__all__ = ["ExpertWeights", "LinearWeight", "expert_matrices", "main_variant", "mapped_experts", "variant_for"]


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts: uint16 bits and the kernel variant that reads them."""

    gate: ExpertMatrices  # [E, F, D]
    up: ExpertMatrices  # [E, F, D]
    down: ExpertMatrices  # [E, D, F]
    variant: KernelVariant

    @cached_property
    def format(self) -> WeightFormat:
        """How the weights are stored."""
        return format_of(self.variant)

    @cached_property
    def expert_bytes(self) -> int:
        """Size of one expert [bytes]."""
        _, hidden, width = self.gate.shape
        nbytes: int = 2 * hidden * self.format.row_bytes(width) + width * self.format.row_bytes(hidden)
        return nbytes

    @cached_property
    def hidden_row_bytes(self) -> int:
        """An expert's size for each of its F hidden rows [bytes]: rows of gate and up, a column of down."""
        return self.expert_bytes // self.gate.shape[1]


@dataclass(frozen=True)
class LinearWeight:
    """One dense weight: uint16 bits [out, in], or [heads, out, in], and the kernel variant that reads them."""

    bits: np.ndarray
    variant: KernelVariant

    @property
    def format(self) -> WeightFormat:
        """How the weights are stored."""
        return format_of(self.variant)


def mapped_experts(model_file: ModelFile, tier: Tier, *, exact: bool) -> list[ExpertWeights]:
    """The experts of every layer that has some; `exact`: float32 activations for bf16 weights, too."""
    experts = []
    for layer in model_file.config.sparse_layers:
        (gate, up, down), kind = expert_matrices(model_file, layer)
        experts.append(ExpertWeights(gate, up, down, variant_for(tier, kind, exact)))
    return experts


def expert_matrices(
    model_file: ModelFile, layer: int
) -> tuple[tuple[ExpertMatrices, ExpertMatrices, ExpertMatrices], str]:
    """gate, up [E, F, D] and down [E, D, F] of a layer, and their GGUF type."""
    gate, up, down = (model_file.config.architecture.tensor_name(role, layer) for role in EXPERTS)
    kind = model_file.stored(gate)[0].type
    of = ExpertMatrices.of
    return (of(model_file.experts(gate)), of(model_file.experts(up)), of(model_file.experts(down))), kind


def variant_for(tier: Tier, kind: str, exact: bool) -> KernelVariant:
    """The kernel variant for weights of a GGUF type; `exact`: float32 activations for bf16 weights, too."""
    weight_format = FORMATS[kind.lower()]
    return KernelVariant(tier, weight_format.name, "f32" if exact else weight_format.partner)


def main_variant(model_file: ModelFile, tier: Tier, *, exact: bool) -> KernelVariant | None:
    """The kernel variant of the first experts; without experts, of the first feed-forward. None: float32 weights."""
    config = model_file.config
    role, layer = (Role.GATE, config.sparse_layers[0]) if config.sparse_layers else (Role.DENSE_GATE, 0)
    kind = model_file.stored(config.architecture.tensor_name(role, layer))[0].type
    return variant_for(tier, kind, exact) if kind.lower() in FORMATS else None
