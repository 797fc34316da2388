"""Loads a model onto a GPU and the CPU: divides the GPU's memory, and chooses how the other weights are copied.

Knows the file, the budget and the parts; not how they compute. The order matters, since each takes memory from the
budget before the next: the driver, dense weights, KV cache, slots for streamed weights, workspace; then experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import ModuleType

import torch

from fiddler import kernels
from fiddler.device.memory_budget import Budget, at_least, shown
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.weight_copy import fastest_copy
from fiddler.errors import RequestError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights
from fiddler.gpu.dense_weights import load_dense, warm_up
from fiddler.gpu.layers import GpuLinear, GpuNorm, GpuRouter
from fiddler.gpu.memory_layout import Sizes, lay_out, least_room
from fiddler.gpu.runner import GpuRunner
from fiddler.models.mixtral import Mixtral
from fiddler.models.rotary import rotary_cos_sin
from fiddler.offload.cost_benchmark import calibrated
from fiddler.offload.expert_cache import Residents
from fiddler.offload.gpu_side import Grouped
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs, Curve
from fiddler.offload.residency import place
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows
from fiddler.runtime.kv_cache import KVCache, kv_bytes
from fiddler.telemetry.recorder import Recorder

__all__ = ["GpuModel", "on_gpu"]
_WORKSPACE_BYTES = 128 << 20  # for an expert's temporaries
_LIBRARY_BYTES = 192 << 20  # that code in the driver and cuBLAS's workspace take while a model loads
_ACTIVATION_BYTES = 60  # per token and element of D: h, x, q, copies and sums that exist at the same time


@dataclass(frozen=True)
class GpuModel:
    """A model ready to run, and a one-line summary of its placement."""

    runner: GpuRunner
    orchestrator: Orchestrator
    summary: str


def on_gpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    pinned: PinnedMapping,
    *,
    gpu_memory: int | None,
    threads: int | None,
    context: int,
    exact: bool,
    counts: Sequence[Sequence[int]] | None,
    most: int | None,
    missing: str,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None],
    recorder: Recorder,
) -> GpuModel:
    """Load `model_file` onto the GPU within `gpu_memory` bytes; `experts` are its layers' experts in the mapping.

    pinned: that mapping, for the GPU's driver. counts: how often each expert was chosen, [L][E], or None.
    most: the maximum number of experts on the GPU; None for all that fit. missing: who computes the others: "auto",
    "cpu" or "stream". progress: called with the bytes of experts loaded so far, and in all.
    Raises RequestError for a budget that is too small or too large; it names the smallest or largest that works.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    pinned.counted()
    budget = Budget(device, gpu_memory)
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    cache_dtype = torch.float16 if experts[0].variant.activations == "bf16" else torch.float32
    sizes = _sizes(model_file, experts, context, cache_dtype)
    _check(budget, sizes)
    triton_kernels = _triton_kernels(device, notify)
    weight_copy = fastest_copy(pinned, device, notify)
    weights, linears = load_dense(model_file, weight_copy, width)
    kv_cache = KVCache(config, context, cache_dtype, device)
    kv_cache.reserve(context)
    with torch.inference_mode():
        cos_sin = torch.view_as_real(rotary_cos_sin(config, torch.arange(context, device=device))).contiguous()
    warm_up(device, cache_dtype)
    count = sizes.experts
    sizes = replace(sizes, fixed=_WORKSPACE_BYTES)  # the rest is allocated by now
    layout = lay_out(budget.room(), sizes, count if most is None else min(most, count))
    if layout is None:
        raise _too_small(budget, sizes)
    chunk, all_resident, expert_bytes, rows = layout.chunk, not layout.slots, sizes.expert, slot_rows(hidden)
    ring = Ring(weight_copy, experts, 64 if all_resident else rows, SLOTS, recorder)
    if all_resident:
        costs, threads = _NO_COSTS, kernels.set_threads(threads)
    else:
        calibration = calibrated(experts, ring, threads, notify)
        costs, threads = calibration.costs(), kernels.set_threads(calibration.threads)
        if missing == "cpu":
            costs = replace(costs, copy=inf)
        elif missing == "stream":
            costs = replace(costs, cpu=Curve((1,), (1e9,)))
    residents = Residents(experts, device)
    placement = place(len(experts), config.expert_count, layout.residents, counts)
    total, done = sum(map(len, placement)) * expert_bytes, 0

    def on_loaded(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    residents.load(placement, weight_copy, on_loaded)
    budget.settle()
    grouped: Grouped | None = None
    if triton_kernels is not None:
        from fiddler.offload import grouped_kernels

        grouped = grouped_kernels.Grouped(device)
    orchestrator = Orchestrator(experts, residents, ring, costs, chunk, _WORKSPACE_BYTES, recorder, grouped)
    linear = GpuLinear(linears, triton_kernels, exact=exact)
    model = Mixtral(config, weights, linear, orchestrator.layer, GpuRouter(triton_kernels), GpuNorm(triton_kernels))
    runner = GpuRunner(model, orchestrator, context, cache_dtype, threads, chunk, kv_cache, budget)
    if triton_kernels is not None:
        from fiddler.gpu import attention_kernels
        from fiddler.gpu.decode_graphs import DecodeGraphs
        from fiddler.gpu.graph_capture import CapturedGraphs

        with torch.inference_mode():
            graphs = CapturedGraphs(model, orchestrator, kv_cache, cos_sin, recorder)
        runner.decode_with(DecodeGraphs(graphs, orchestrator, recorder), cos_sin, attention_kernels)
    budget.settle()
    summary = (
        f"{torch.cuda.get_device_name(device)}, {len(residents)} of {count} experts on it, "
        f"{shown(budget.used())} of {shown(budget.total)} used"
    )
    return GpuModel(runner, orchestrator, summary)


_NO_COSTS = Costs(Curve((1,), (1.0,)), Curve((1,), (1.0,)), 1.0, 0.0)  # of a model whose experts are all resident


def _triton_kernels(device: torch.device, notify: Callable[[str], None]) -> ModuleType | None:
    """`decode_kernels` where Triton runs; else None, after a line to `notify`."""
    try:
        from fiddler.gpu import decode_kernels
    except ImportError:
        notify("torch came without Triton: single tokens take the slower way through torch")
        return None
    reason = decode_kernels.works(device)
    if reason is not None:
        notify(f"Triton does not run here ({reason}): single tokens take the slower way through torch")
        return None
    return decode_kernels


def _sizes(model_file: ModelFile, experts: Sequence[ExpertWeights], context: int, cache_dtype: torch.dtype) -> Sizes:
    """Memory that the model will take on the GPU."""
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    tensors = model_file.file.tensors
    names = config.tensor_shapes(tied=model_file.tied)
    dense = sum(tensors[name].nbytes for name in names if not name.endswith("_exps.weight"))
    position_bytes = kv_bytes(config, context, cache_dtype, context) + 4 * context * config.head_dim  # float32 cos_sin
    return Sizes(
        fixed=dense + position_bytes + _WORKSPACE_BYTES,
        token=width * _ACTIVATION_BYTES,
        slots=Ring.nbytes(experts, slot_rows(hidden), SLOTS),
        expert=max(weights.expert_bytes for weights in experts),
        experts=len(experts) * config.expert_count,
        context=context,
    )


def _check(budget: Budget, sizes: Sizes) -> None:
    """Raise RequestError where the budget is too small, before anything goes to the GPU."""
    sizes = replace(sizes, fixed=sizes.fixed + _LIBRARY_BYTES)
    if least_room(sizes) > budget.room():
        raise _too_small(budget, sizes)


def _too_small(budget: Budget, sizes: Sizes) -> RequestError:
    required = budget.total - budget.room() + least_room(sizes)
    return RequestError(
        f"--gpu-memory {shown(budget.total)}: too little; without any expert this model needs "
        f"{at_least(required)} with a context of {sizes.context}"
    )
