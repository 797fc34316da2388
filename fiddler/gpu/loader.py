"""Loads a model onto a GPU and the CPU: divides the GPU's memory, and chooses how the other weights are copied.

Knows the file, the budget and the parts; not how they compute. The order matters, since each takes memory from the
budget before the next: the driver, dense weights, KV cache, slots for streamed weights, workspace; then experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import ModuleType
from typing import NamedTuple

import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.memory_budget import Budget, GpuStartError, at_least, shown
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.weight_copy import WeightCopy, fastest_copy
from fiddler.errors import FiddlerError, RequestError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, main_variant, mean_expert_bytes
from fiddler.gpu.decoder import can_decode, decode_with_graphs
from fiddler.gpu.dense_weights import decoded_bytes, load_dense, warm_up
from fiddler.gpu.growing_pool import SEGMENT_BYTES, GrowingPool
from fiddler.gpu.memory_layout import FirstBlocks, Layout, Sizes, first_blocks, lay_out, least_room
from fiddler.gpu.runner import GpuRunner
from fiddler.gpu.transformer import transformer_on_gpu
from fiddler.kernels import Tier
from fiddler.load_options import LoadOptions
from fiddler.models.architecture import EXPERTS
from fiddler.models.config import Config
from fiddler.models.rotary import rotary_cos_sin
from fiddler.offload.cost_benchmark import calibrated
from fiddler.offload.expert_biases import ExpertBiases
from fiddler.offload.expert_cache import Residents
from fiddler.offload.gpu_side import Grouped, prompt_decode_bytes
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs
from fiddler.offload.residency import place, within
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows
from fiddler.runtime.block_pool import block_bytes, blocks_for
from fiddler.runtime.cache_type import cache_types
from fiddler.runtime.host_store import host_store_bytes
from fiddler.telemetry.recorder import Recorder

__all__ = ["GpuModel", "on_gpu"]
_SEPARATE_BYTES = 10 << 20  # from which torch's allocator gives a tensor memory of its own, which can be freed alone
_FIRST_POSITIONS = 4096  # of a sequence, for which there is memory from the start
_WORKSPACE_BYTES = 128 << 20  # for an expert's temporaries
_LIBRARY_BYTES = 192 << 20  # that code in the driver and cuBLAS's workspace take while a model loads
_ACTIVATION_BYTES = 60  # per token and element of D: h, x, q, copies and sums that exist at the same time
_DENSE_BYTES = 16  # per token and element of a dense layer's feed-forward, and of D: gate, up and what is made of them


@dataclass(frozen=True)
class GpuModel:
    """A model ready to run, and a one-line summary of its placement."""

    runner: GpuRunner
    orchestrator: Orchestrator | None  # None: the model has no experts
    summary: str


def on_gpu(
    model_file: ModelFile,
    experts: Sequence[ExpertWeights],
    tier: Tier,
    pinned: PinnedMapping,
    options: LoadOptions,
    counts: Sequence[Sequence[int]] | None,
    notify: Callable[[str], None],
    progress: Callable[[int, int], None],
    recorder: Recorder,
) -> GpuModel:
    """Load `model_file` onto the GPU within `options.gpu_memory`; `experts` are its layers' experts in the mapping.

    pinned: that mapping, for the GPU's driver. counts: how often each expert was chosen, [L][E], or None.
    progress: called with the bytes of experts loaded so far, and in all.
    Raises RequestError for a budget that is too small or too large; it names the smallest or largest that works.
    For a model without experts that does not fit: GpuStartError, as for a GPU that does not start.
    """
    device, matmul = torch.device("cuda", torch.cuda.current_device()), torch.backends.cuda.matmul
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = False
    pinned.counted()
    budget = Budget(device, options.gpu_memory)
    config, main = model_file.config, main_variant(model_file, tier, exact=options.exact)
    context = options.capacity(config.context_length)
    cache_dtype, read_as = cache_types(model_file, options.cache_type_k, main)
    sizes = _sizes(model_file, experts, context, cache_dtype, exact=options.exact)
    decoded = prompt_decode_bytes(experts, _spare(budget, sizes, config), exact=options.exact)
    triton_kernels = _triton_kernels(device, notify, required=model_file.quantised)
    weight_copy = fastest_copy(pinned, device, notify)
    dense = load_dense(model_file, weight_copy)
    grouped = _grouped(device, triton_kernels, decoded) if experts else None
    max_residents = sizes.experts if options.gpu_experts is None else min(options.gpu_experts, sizes.experts)
    sizes = replace(sizes, fixed=_WORKSPACE_BYTES + ExpertBiases.nbytes(experts))  # the rest is allocated here
    layers = len(config.sparse_layers) if counts is None and sizes.expert >= _SEPARATE_BYTES else None
    begin = _first_blocks(budget.room(), sizes, max_residents, block_bytes(config, cache_dtype), layers)
    pool = GrowingPool(config, cache_dtype, device, begin.blocks, read_as)
    with torch.inference_mode():
        cos_sin = torch.view_as_real(rotary_cos_sin(config, torch.arange(context, device=device), rotated_alone=True))
    warm_up(device, read_as)
    layout = lay_out(budget.room(), replace(sizes, fixed=sizes.fixed + begin.spare), begin.max_residents)
    if layout is None:
        raise _too_small(budget, sizes, config)
    layout = replace(layout, chunk=min(layout.chunk, begin.chunk))
    orchestrator, threads = None, kernels.set_threads(options.threads)
    if experts:
        orchestrator, threads = _orchestrated(
            *(experts, config.expert_used_count, weight_copy, layout, options, counts),
            *(grouped, _Reports(notify, progress, recorder)),
        )
    budget.settle()
    model = transformer_on_gpu(config, dense, orchestrator, triton_kernels, recorder, exact=options.exact)
    runner = GpuRunner(model, orchestrator, context, cache_dtype, threads, layout.chunk, pool, budget)
    if triton_kernels is not None and can_decode({each for w in experts for each in w.matrix_formats}):
        decode_with_graphs(runner, cos_sin, recorder)
    budget.settle()
    runner.share_budget(lambda: budget.room() - layout.chunk * sizes.token, begin.later)  # steps allocate activations
    runner.store_in_host(host_store_bytes(sum(nbytes for _, nbytes in model_file.file.mappings)))
    resident = "all" if orchestrator is None else f"{len(orchestrator.residents)} of {sizes.experts} experts"
    used = f"{shown(budget.used())} of {shown(budget.total)} used"
    return GpuModel(runner, orchestrator, f"{torch.cuda.get_device_name(device)}, {resident} on it, {used}")


def _first_blocks(room: int, sizes: Sizes, max_residents: int, nbytes: int, layers: int | None) -> FirstBlocks:
    """`first_blocks` of `nbytes` each."""
    blocks = _least_blocks(min(sizes.context, _FIRST_POSITIONS)), _least_blocks(sizes.context)
    return first_blocks(room, sizes, max_residents, blocks, nbytes, SEGMENT_BYTES, layers)


class _Reports(NamedTuple):
    """Receivers of what happens while a model is loaded, and afterwards."""

    notify: Callable[[str], None]
    progress: Callable[[int, int], None]
    recorder: Recorder


def _orchestrated(
    experts: Sequence[ExpertWeights],
    k: int,
    weight_copy: WeightCopy,
    layout: Layout,
    options: LoadOptions,
    counts: Sequence[Sequence[int]] | None,
    grouped: Grouped | None,
    reports: _Reports,
) -> tuple[Orchestrator, int]:
    """The experts, with residents on the GPU and the staging ring for the others; and the number of CPU threads."""
    ring = Ring(weight_copy, experts, slot_rows(experts) if layout.slots else 64, SLOTS, reports.recorder)
    costs, threads = _NO_COSTS, options.threads
    if layout.slots:
        costs, threads = _costs(experts, ring, options, k, grouped, reports.notify)
    placement = place(len(experts), len(experts[0].gate), layout.residents, counts)
    sizes = [weights.expert_bytes for weights in experts]
    placement = within(placement, sizes, layout.residents * mean_expert_bytes(experts), counts)
    residents = _load_residents(experts, placement, ring, reports.progress)
    limits, threads = (layout.chunk, _WORKSPACE_BYTES), kernels.set_threads(threads)
    return Orchestrator(experts, residents, ring, costs, *limits, reports.recorder, grouped), threads


def _costs(
    experts: Sequence[ExpertWeights],
    ring: Ring,
    options: LoadOptions,
    k: int,
    grouped: Grouped | None,
    notify: Callable[[str], None],
) -> tuple[Costs, int]:
    """The costs to plan with, which also say who computes missing experts, and the number of CPU threads."""
    calibration = calibrated(experts, ring, options.threads, notify, k=k, grouped=grouped)
    costs = calibration.costs()
    if options.missing == "cpu":
        costs = replace(costs, copy=inf)
    elif options.missing == "stream":
        costs = replace(costs, cpu=Curve((1,), (1e9,)), cpu_alone=None)
    return costs, calibration.threads


def _load_residents(
    experts: Sequence[ExpertWeights],
    placement: Sequence[Sequence[int]],
    ring: Ring,
    progress: Callable[[int, int], None],
) -> Residents:
    """The experts of `placement`, [L] lists of expert ids, on the GPU."""
    residents = Residents(experts, ring.weight_copy.device)
    total, done = sum(len(ids) * w.expert_bytes for ids, w in zip(placement, experts, strict=True)), 0

    def on_loaded(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    residents.load(placement, ring.weight_copy, on_loaded)
    return residents


def _grouped(device: torch.device, triton_kernels: ModuleType | None, decoded: int) -> Grouped | None:
    """Triton's kernels for several tokens, where Triton runs. decoded: see `gpu_side.prompt_decode_bytes`."""
    if triton_kernels is None:
        return None
    from fiddler.offload.grouped_kernels import Grouped as TritonGrouped

    return TritonGrouped(device, decoded)


def _least_blocks(context: int) -> int:
    """Blocks of one sequence of the whole context, and one more, for a copy of a block that it shares."""
    return blocks_for(context) + 1


_NO_COSTS = Costs(Curve((1,), (1.0,)), Curve((1,), (1.0,)), 1.0, 0.0)  # of a model whose experts are all resident


def _triton_kernels(device: torch.device, notify: Callable[[str], None], *, required: bool) -> ModuleType | None:
    """`decode_kernels` where Triton runs; else None, after a line to `notify`. required: else GpuStartError."""
    try:
        from fiddler.gpu import decode_kernels

        reason = decode_kernels.works(device)
    except ImportError:
        reason = "torch came without it"
    if reason is None:
        return decode_kernels
    if required:
        raise GpuStartError(f"Triton, which decodes quantised weights on a GPU, does not run here ({reason})")
    notify(f"Triton does not run here ({reason}): single tokens take the slower way through torch")
    return None


def _sizes(
    model_file: ModelFile, experts: Sequence[ExpertWeights], context: int, cache_dtype: torch.dtype, *, exact: bool
) -> Sizes:
    """Memory that the model will take on the GPU."""
    config = model_file.config
    width = max(config.embedding_length, config.head_count * config.head_dim)
    feed_forward = config.feed_forward_length + config.embedding_length
    declared = config.tensors(tied=model_file.tied)
    dense = sum(model_file.file.tensors[name].nbytes for name, tensor in declared.items() if tensor.role not in EXPERTS)
    decoded_experts = prompt_decode_bytes(experts, 0, exact=exact)
    cos_sin_bytes = 4 * context * config.rotated
    position_bytes = _least_blocks(context) * block_bytes(config, cache_dtype) + cos_sin_bytes
    return Sizes(
        fixed=dense + decoded_bytes(model_file) + position_bytes + _WORKSPACE_BYTES + decoded_experts,
        token=max(width * _ACTIVATION_BYTES, feed_forward * _DENSE_BYTES),
        slots=Ring.nbytes(experts, slot_rows(experts), SLOTS) if experts else 0,
        expert=mean_expert_bytes(experts),
        experts=len(experts) * config.expert_count,
        context=context,
    )


def _spare(budget: Budget, sizes: Sizes, config: Config) -> int:
    """What the budget has beyond the least [bytes]. Raises an error, before anything is loaded, where it has less."""
    sizes = replace(sizes, fixed=sizes.fixed + _LIBRARY_BYTES)
    spare = budget.room() - least_room(sizes)
    if spare < 0:
        raise _too_small(budget, sizes, config)
    return spare


def _too_small(budget: Budget, sizes: Sizes, config: Config) -> FiddlerError:
    """The error for a budget that is too small; `GpuStartError` where nothing but the CPU could run the model."""
    required = budget.total - budget.room() + least_room(sizes)
    if not sizes.experts:
        return GpuStartError(
            f"a {config.architecture.name} has no experts that the CPU could compute, so all of it must fit the GPU: "
            f"{at_least(required)} with a context of {sizes.context}, and {shown(budget.total)} are there; "
            "--device cpu runs it"
        )
    return RequestError(
        f"--gpu-memory {shown(budget.total)}: too little; without any expert this model needs "
        f"{at_least(required)} with a context of {sizes.context}"
    )
