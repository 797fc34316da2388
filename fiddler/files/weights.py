"""A model file's weights as views of the mapping, with the kernel variant that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fiddler.files.model_file import ModelFile
from fiddler.kernels import KernelVariant, Tier

__all__ = ["ExpertWeights", "LinearWeight", "mapped_experts", "variant_for"]


@dataclass(frozen=True)
class ExpertWeights:
    """One layer's experts: uint16 bits and the kernel variant that reads them."""

    gate: np.ndarray  # [E, F, D]
    up: np.ndarray  # [E, F, D]
    down: np.ndarray  # [E, D, F]
    variant: KernelVariant

    @property
    def hidden_row_bytes(self) -> int:
        """Bytes of one hidden row of an expert: a row of gate and up, and a column of down."""
        return 3 * int(self.gate[0, 0].nbytes)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return int(self.gate.shape[1]) * self.hidden_row_bytes


@dataclass(frozen=True)
class LinearWeight:
    """One dense weight: uint16 bits [out, in] and the kernel variant that reads them."""

    bits: np.ndarray
    variant: KernelVariant


def mapped_experts(model_file: ModelFile, tier: Tier, *, exact: bool) -> list[ExpertWeights]:
    """The experts of every layer; `exact`: float32 activations for bf16 weights, too."""
    experts = []
    for layer in range(model_file.config.block_count):
        names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
        (gate, kind), (up, _), (down, _) = (model_file.bits(name) for name in names)
        experts.append(ExpertWeights(gate, up, down, variant_for(tier, kind, exact)))
    return experts


def variant_for(tier: Tier, kind: str, exact: bool) -> KernelVariant:
    """The kernel variant for weights of a GGUF type; `exact`: float32 activations for bf16 weights, too."""
    weights = "bf16" if kind == "BF16" else "f16"
    return KernelVariant(tier, weights, "f32" if exact or weights == "f16" else "bf16")
