"""Where a layer's weights meet its tokens on the CPU: the kernels behind the model's two seams.

Knows the mapped bits and the kernels; not the model's structure nor the file they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler import kernels
from fiddler.files.weights import ExpertWeights, LinearWeight
from fiddler.kernels import KernelVariant
from fiddler.models import router
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["FEW", "CpuExperts", "CpuLinear", "rms_norm", "route"]

FEW = 32  # tokens


class CpuExperts:
    """Every expert computed by the CPU kernels, straight from the mapping."""

    def __init__(self, layers: list[ExpertWeights], recorder: Recorder = SILENT) -> None:
        self._layers = layers
        self._recorder = recorder

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """The model's `Experts`."""
        w = self._layers[layer]
        read = len(set(expert_ids.reshape(-1).tolist())) * 3 * w.gate.nbytes // len(w.gate)
        with self._recorder.span("experts", read):
            y = kernels.expert_ffn(
                x.numpy(), expert_ids.numpy(), routing_weights.numpy(), w.gate, w.up, w.down, w.variant
            )
        return torch.from_numpy(y)


class CpuLinear:
    """Dense products by the CPU kernels, straight from the mapping; float32 weights by torch."""

    def __init__(self, weights: Mapping[str, LinearWeight | Tensor], recorder: Recorder = SILENT) -> None:
        self._weights = weights
        self._recorder = recorder

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """The model's `Linear`."""
        (made,) = self.together(x, [name])
        return made if onto is None else made.add_(onto)

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """The same for several weights that take the same x; neighbours of a kind in one call of the kernels."""
        made: list[Tensor] = []
        for variant, same in groupby((self._weights[name] for name in names), key=_variant_of):
            weights = list(same)
            with self._recorder.span("dense", sum(_bits(weight).nbytes for weight in weights)):
                if variant is None:
                    made += (F.linear(x, weight) for weight in weights if isinstance(weight, Tensor))
                else:
                    results = kernels.linears(x.numpy(), [_bits(weight) for weight in weights], variant)
                    made += (torch.from_numpy(y) for y in results)
        return made


def route(h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's `Router`: by our kernels where there are few tokens, by torch on all its threads where many."""
    if len(h) > FEW:
        return router.route(h, norm, epsilon, weight, k)
    x = kernels.rms_norm(h.numpy(), norm.numpy(), epsilon)
    expert_ids, routing_weights = kernels.route(x, weight.numpy(), k)
    return torch.from_numpy(x), torch.from_numpy(expert_ids), torch.from_numpy(routing_weights)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The model's `Norm`, likewise."""
    if len(x) > FEW:
        return router.rms_norm(x, weight, epsilon)
    return torch.from_numpy(kernels.rms_norm(x.numpy(), weight.numpy(), epsilon))


def _variant_of(weight: LinearWeight | Tensor) -> KernelVariant | None:
    return None if isinstance(weight, Tensor) else weight.variant


def _bits(weight: LinearWeight | Tensor) -> np.ndarray:
    return weight.numpy() if isinstance(weight, Tensor) else weight.bits
