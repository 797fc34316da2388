"""Puts a model together on a GPU and the CPU: what goes into the GPU's memory, and over which link the rest is read.

Knows the file, the budget and the parts; not how they compute. In this order, since each takes from the budget what
the next may have: the driver, dense weights, keys and values, slots for streamed weights, work space; then experts.
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
from fiddler.offload.orchestrator import Grouped, Orchestrator
from fiddler.offload.plan import Costs, Curve
from fiddler.offload.residency import place
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows
from fiddler.runtime.kv_cache import KVCache, kv_bytes
from fiddler.telemetry.recorder import Recorder

__all__ = ["Hybrid", "on_gpu"]
_WORK = 128 << 20  # bytes for an expert's temporaries
_LIBRARIES = 192 << 20  # bytes that go, while a model is loaded, to the driver for code and to cuBLAS as work space
_ACTIVATIONS = 60  # bytes a token and element of D: what of h, x, q, their copies and sums exists at once


@dataclass(frozen=True)
class Hybrid:
    """A model that runs, and one line that says where."""

    runner: GpuRunner
    orchestrator: Orchestrator
    summary: str


def on_gpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    pinned: PinnedMapping,
    *,
    gpu_memory: str | None,
    threads: int | None,
    context: int,
    exact: bool,
    counts: Sequence[Sequence[int]] | None,
    most: int | None,
    missing: str,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None],
    recorder: Recorder,
) -> Hybrid:
    """Load `model_file` onto the GPU as far as `gpu_memory` goes; `experts` are its layers' in the mapping.

    registration: of that mapping.
    counts: how often each expert was chosen, [L][E], or None. most: experts on the GPU, or None for all that fit.
    missing: "auto", "cpu" or "stream", who computes the others. progress: is told of bytes of experts, done and in all.
    Raises RequestError, which names the least or the most that works, for a budget that does not.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    pinned.counted()
    budget = Budget(device, gpu_memory)
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    rounded = not exact and experts[0].variant.weights == "bf16"
    cache_dtype = torch.float16 if rounded else torch.float32
    sizes = _sizes(model_file, experts, context, cache_dtype)
    _check(budget, sizes, gpu_memory)
    one_token = _one_token(device, notify)
    weight_copy = fastest_copy(pinned, device, notify)
    weights, linears = load_dense(model_file, weight_copy, width)
    home = KVCache(config, context, cache_dtype, device)
    home.reserve(context)
    with torch.inference_mode():
        cos_sin = torch.view_as_real(rotary_cos_sin(config, torch.arange(context, device=device))).contiguous()
    warm_up(device, cache_dtype)
    count = sizes.experts
    sizes = replace(sizes, fixed=_WORK)  # the rest is there by now
    layout = lay_out(budget.room(), sizes, count if most is None else min(most, count))
    if layout is None:
        raise _too_little(budget, sizes, gpu_memory)
    chunk, everything, expert_bytes, rows = layout.chunk, not layout.slots, sizes.expert, slot_rows(hidden)
    ring = Ring(weight_copy, experts, 64 if everything else rows, SLOTS, recorder)
    if everything:
        costs, threads = _NO_COSTS, kernels.set_threads(threads)
    else:
        calibration = calibrated(experts, ring, threads, notify)
        costs, threads = calibration.costs(), kernels.set_threads(calibration.threads)
        if missing == "cpu":
            costs = replace(costs, copy=inf)
        elif missing == "stream":
            costs = replace(costs, cpu=Curve((1,), (1e9,)))
    residents = Residents(experts, device)
    placed = place(len(experts), config.expert_count, layout.residents, counts)
    total, done = sum(map(len, placed)) * expert_bytes, 0

    def loaded(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    residents.load(placed, weight_copy, loaded)
    budget.settle()
    grouped: Grouped | None = None
    if one_token is not None:
        from fiddler.offload import grouped_kernels

        grouped = grouped_kernels.Grouped(device)
    orchestrator = Orchestrator(experts, residents, ring, costs, chunk, _WORK, recorder, grouped)
    linear = GpuLinear(linears, one_token, exact=exact)
    model = Mixtral(config, weights, linear, orchestrator, GpuRouter(one_token), GpuNorm(one_token))
    runner = GpuRunner(
        model, orchestrator.beside, orchestrator.start_over, context, cache_dtype, threads, chunk, home, budget
    )
    if one_token is not None:
        from fiddler.gpu import attention_kernels
        from fiddler.gpu.decode_graphs import DecodeGraphs

        with torch.inference_mode():
            decoder = DecodeGraphs(model, orchestrator, home, cos_sin, recorder)
        runner.decode_with(decoder, cos_sin, attention_kernels)
    budget.settle()
    summary = (
        f"{torch.cuda.get_device_name(device)}, {len(residents)} of {count} experts on it, "
        f"{shown(budget.used())} of {shown(budget.total)} used"
    )
    return Hybrid(runner, orchestrator, summary)


_NO_COSTS = Costs(Curve((1,), (1.0,)), Curve((1,), (1.0,)), 1.0, 0.0)  # nothing is ever missing


def _one_token(device: torch.device, notify: Callable[[str], None]) -> ModuleType | None:
    """The kernels for one token, where they run."""
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


def _sizes(model_file: ModelFile, experts: Sequence[ExpertWeights], context: int, cache: torch.dtype) -> Sizes:
    """What goes to the GPU, before anything did."""
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    tensors = model_file.file.tensors
    names = config.tensor_shapes(tied=model_file.tied)
    dense = sum(tensors[name].nbytes for name in names if not name.endswith("_exps.weight"))
    kept = kv_bytes(config, context, cache, context) + 4 * context * config.head_dim  # and turns, in float32
    return Sizes(
        fixed=dense + kept + _WORK,
        token=width * _ACTIVATIONS,
        slots=Ring.nbytes(width, slot_rows(hidden), SLOTS),
        expert=3 * experts[0].gate[0].nbytes,
        experts=len(experts) * config.expert_count,
        context=context,
    )


def _check(budget: Budget, sizes: Sizes, asked: str | None) -> None:
    """Raises RequestError where the budget is too small, before anything goes to the GPU."""
    sizes = replace(sizes, fixed=sizes.fixed + _LIBRARIES)
    if least_room(sizes) > budget.room():
        raise _too_little(budget, sizes, asked)


def _too_little(budget: Budget, sizes: Sizes, asked: str | None) -> RequestError:
    least = budget.total - budget.room() + least_room(sizes)
    return RequestError(
        f"--gpu-memory {asked or shown(budget.total)}: too little; without any expert this model needs "
        f"{at_least(least)} with a context of {sizes.context}"
    )
