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
from fiddler.models.activation import activated
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["MAX_KERNEL_TOKENS", "CpuExperts", "CpuLinear", "EmbeddingRows", "rms_norm", "route", "routing_of"]

_WIDENED = 1 << 18  # elements of a weight that one product widens to float32: 1 MB, which a core's cache holds
MAX_KERNEL_TOKENS = 32  # tokens that our routing, norm and decode-step kernels take; torch computes larger steps


class CpuExperts:
    """Computes all experts with the CPU kernels, straight from the mapping."""

    def __init__(self, layers: list[ExpertWeights], recorder: Recorder = SILENT) -> None:
        self._layers = layers
        self._recorder = recorder
        self._checked: dict[int, kernels.ExpertFfn] = {}  # by layer

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """Implements `Experts`."""
        self._recorder.chosen(layer, expert_ids)
        w = self._layers[layer]
        with self._recorder.span("experts", len(set(expert_ids.reshape(-1).tolist())) * w.expert_bytes):
            if len({variant.grouping for variant in w.variants}) > 1:
                return _product_by_product(x, expert_ids, routing_weights, w)
            if layer not in self._checked:
                self._checked[layer] = w.ffn()
            y = self._checked[layer](x.numpy(), expert_ids.numpy(), routing_weights.numpy())
        return torch.from_numpy(y)


def _product_by_product(x: Tensor, expert_ids: Tensor, routing_weights: Tensor, w: ExpertWeights) -> Tensor:
    """`CpuExperts` where gate, up and down have formats that one kernel does not multiply: a call for each."""
    ids, (of_gate, of_up, of_down) = expert_ids.reshape(-1).numpy(), w.variants
    rows = x.repeat_interleave(expert_ids.shape[1], 0).numpy()  # [T * K, D]
    gated, linear = (torch.from_numpy(_with_bias(rows, ids, *each)) for each in ((w.gate, of_gate), (w.up, of_up)))
    hidden = activated(gated, linear, w.activation)
    y = torch.from_numpy(_with_bias(hidden.numpy(), ids, w.down, of_down))
    return (y.view(*expert_ids.shape, -1) * routing_weights[..., None]).sum(1)


def _with_bias(
    x: np.ndarray, expert_ids: np.ndarray, matrices: kernels.ExpertMatrices, variant: KernelVariant
) -> np.ndarray:
    """Each row's product with its expert's matrix, and the expert's bias."""
    y = kernels.per_expert(x, expert_ids, matrices, variant)
    return y if matrices.bias is None else y + matrices.bias[expert_ids]


class EmbeddingRows:
    """Implements `Embeddings` for quantised embeddings: rows are decoded as they are looked up."""

    device = torch.device("cpu")

    def __init__(self, rows: kernels.StoredRows) -> None:
        self._rows = rows

    def __getitem__(self, ids: Tensor) -> Tensor:
        """Implements `Embeddings`."""
        return torch.from_numpy(self._rows[ids.numpy()])


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
        """Implements `Linear.together`: one kernel call for consecutive weights that it can multiply together."""
        outputs: list[Tensor] = []
        for grouping, group in groupby((self._weights[name] for name in names), key=_grouping_of):
            weights = list(group)
            with self._recorder.span("dense", sum(_bits(weight).nbytes for weight in weights)):
                if grouping is None:
                    outputs += (F.linear(x, weight) for weight in weights if isinstance(weight, Tensor))
                else:
                    variants = [weight.variant for weight in weights if isinstance(weight, LinearWeight)]
                    results = kernels.linears(x.numpy(), [_bits(weight) for weight in weights], variants)
                    outputs += (torch.from_numpy(y) for y in results)
        return outputs

    def feed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Implements `Linear.feed_forward`: the kernel of one expert, where it can multiply all weights."""
        weights = [self._weights[name] for name in names]
        variants = tuple(weight.variant for weight in weights if isinstance(weight, LinearWeight))
        if len(variants) < 3 or len({variant.grouping for variant in variants}) > 1:
            gated, linear = self.together(x, names[:2])
            return self(F.silu(gated) * linear, names[2])
        expert_ids, routing_weights = np.zeros((len(x), 1), np.int64), np.ones((len(x), 1), np.float32)
        gate, up, down = (_bits(weight)[None] for weight in weights)
        with self._recorder.span("dense", gate.nbytes + up.nbytes + down.nbytes):
            of_gate, of_up, of_down = variants
            y = kernels.expert_ffn(x.numpy(), expert_ids, routing_weights, gate, up, down, (of_gate, of_up, of_down))
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
    biases = (None if each is None else each.numpy() for each in (weights.selection_bias, weights.bias))
    expert_ids, routing_weights = kernels.route(x, weights.gate.numpy(), k, routing_of(rule), *biases)
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


def _grouping_of(weight: LinearWeight | Tensor) -> KernelVariant | None:
    return None if isinstance(weight, Tensor) else weight.variant.grouping


def _bits(weight: LinearWeight | Tensor) -> np.ndarray:
    return weight.numpy() if isinstance(weight, Tensor) else weight.bits
