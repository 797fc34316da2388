"""The model's forward pass with its dense part on a GPU: Triton's kernels where they run, torch elsewhere.

Knows which implementation each part gets; not the file, the budget, nor where experts are.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

from torch import Tensor

from fiddler.gpu.dense_weights import DenseWeights
from fiddler.gpu.layers import GpuLinear, GpuNorm
from fiddler.models.config import Config
from fiddler.models.interfaces import Router
from fiddler.models.rotary import heads
from fiddler.models.router import route
from fiddler.models.transformer import Transformer
from fiddler.offload.orchestrator import Orchestrator
from fiddler.telemetry.recorder import Recorder

__all__ = ["transformer_on_gpu"]


def transformer_on_gpu(
    config: Config,
    dense: DenseWeights,
    orchestrator: Orchestrator | None,
    triton_kernels: ModuleType | None,
    recorder: Recorder,
    *,
    exact: bool,
) -> Transformer:
    """The model with these weights, on the GPU; `orchestrator` computes its experts."""
    linear = GpuLinear(dense.linears, triton_kernels, exact=exact)
    router, norm, dense_span = _router(triton_kernels), GpuNorm(triton_kernels), partial(recorder.queued, "dense")
    layer = _no_experts if orchestrator is None else orchestrator.layer
    make_heads = heads if triton_kernels is None else triton_kernels.heads
    return Transformer(config, dense.tensors, linear, layer, router, norm, dense_span, dense.embeddings, make_heads)


def _no_experts(layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
    raise AssertionError("a model without experts has no layer that computes some")


def _router(triton_kernels: ModuleType | None) -> Router:
    """Triton's router, where Triton runs."""
    if triton_kernels is None:
        return route
    from fiddler.gpu.router_kernels import route as triton_route

    return triton_route
