"""The model's experts, linears, router and norm on the CPU, through our kernels.

Knows the mapped weights and the kernels; not the model's structure, nor the file that the weights come from.
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
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["MAX_KERNEL_TOKENS", "CpuExperts", "CpuLinear", "rms_norm", "route", "routing_of"]

_WIDENED = 1 << 18  # elements of a weight that one product widens to float32: 1 MB, which a core's cache holds
MAX_KERNEL_TOKENS = 32  # tokens that our routing, norm and decode-step kernels take; torch computes larger steps


class CpuExperts:
    """Computes all experts with the CPU kernels, straight from the mapping."""

    def __init__(self, layers: list[ExpertWeights], recorder: Recorder = SILENT) -> None:
        self._layers = layers
        self._recorder = recorder

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """Implements `Experts`."""
        self._recorder.chosen(layer, expert_ids)
        w = self._layers[layer]
        with self._recorder.span("experts", len(set(expert_ids.reshape(-1).tolist())) * w.expert_bytes):
            y = kernels.expert_ffn(
                x.numpy(), expert_ids.numpy(), routing_weights.numpy(), w.gate, w.up, w.down, w.variant
            )
        return torch.from_numpy(y)


class CpuLinear:
    """Dense products by the CPU kernels, straight from the mapping; torch multiplies by float32 weights."""

    def __init__(self, weights: Mapping[str, LinearWeight | Tensor], recorder: Recorder = SILENT) -> None:
        self._weights = weights
        self._recorder = recorder

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """Implements `Linear`."""
        (y,) = self.together(x, [name])
        return y if onto is None else y.add_(onto)

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Implements `Linear.together`: one kernel call for consecutive weights of one kernel variant."""
        outputs: list[Tensor] = []
        for variant, group in groupby((self._weights[name] for name in names), key=_variant_of):
            weights = list(group)
            with self._recorder.span("dense", sum(_bits(weight).nbytes for weight in weights)):
                if variant is None:
                    outputs += (F.linear(x, weight) for weight in weights if isinstance(weight, Tensor))
                else:
                    results = kernels.linears(x.numpy(), [_bits(weight) for weight in weights], variant)
                    outputs += (torch.from_numpy(y) for y in results)
        return outputs

    def feed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Implements `Linear.feed_forward`: the kernel of one expert, where all weights have one variant."""
        weights = [self._weights[name] for name in names]
        variant = _variant_of(weights[0])
        if variant is None or any(_variant_of(weight) != variant for weight in weights):
            gated, linear = self.together(x, names[:2])
            return self(F.silu(gated) * linear, names[2])
        expert_ids, routing_weights = np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32)
        gate, up, down = (_bits(weight)[None] for weight in weights)
        with self._recorder.span("dense", gate.nbytes + up.nbytes + down.nbytes):
            y = kernels.expert_ffn(x.numpy(), expert_ids, routing_weights, gate, up, down, variant)
        return torch.from_numpy(y)

    def per_head(self, x: Tensor, name: str) -> Tensor:
        """Implements `Linear.per_head`: one kernel call; torch multiplies by float32 weights and by strided views."""
        weight = self._weights[name]
        if not isinstance(weight, Tensor):
            with self._recorder.span("dense", weight.bits.nbytes):
                return torch.from_numpy(kernels.per_head(x.numpy(), weight.bits, weight.variant))
        step = max(1, _WIDENED // weight[0].numel())
        products, each = [], x.transpose(0, 1)  # [H, T, in]
        with self._recorder.span("dense", weight.numel() * weight.itemsize):
            for begin in range(0, len(weight), step):
                heads = slice(begin, begin + step)
                products.append(torch.bmm(each[heads], weight[heads].float().mT))
        return torch.cat(products).transpose(0, 1)


def route(h: Tensor, epsilon: float, weights: RouterWeights, rule: RouterRule, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `Router`: our kernels take up to `MAX_KERNEL_TOKENS` tokens; torch, on all its threads, takes more."""
    if len(h) > MAX_KERNEL_TOKENS:
        return router.route(h, epsilon, weights, rule, k)
    x = kernels.rms_norm(h.numpy(), weights.norm.numpy(), epsilon)
    bias = None if weights.selection_bias is None else weights.selection_bias.numpy()
    expert_ids, routing_weights = kernels.route(x, weights.gate.numpy(), k, routing_of(rule), bias)
    return torch.from_numpy(x), torch.from_numpy(expert_ids), torch.from_numpy(routing_weights)


def routing_of(rule: RouterRule) -> kernels.Routing:
    """A router's rule as our kernels take it."""
    sigmoid = rule.scoring is Scoring.SIGMOID
    return kernels.Routing(sigmoid, rule.renormalise, rule.scale, rule.groups, rule.groups_used)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Implements `Norm`, likewise."""
    if len(x) > MAX_KERNEL_TOKENS:
        return router.rms_norm(x, weight, epsilon)
    return torch.from_numpy(kernels.rms_norm(x.numpy(), weight.numpy(), epsilon))


def _variant_of(weight: LinearWeight | Tensor) -> KernelVariant | None:
    return None if isinstance(weight, Tensor) else weight.variant


def _bits(weight: LinearWeight | Tensor) -> np.ndarray:
    return weight.numpy() if isinstance(weight, Tensor) else weight.bits
