"""Puts a model together on a GPU and the CPU: what goes into the GPU's memory, and over which link the rest is read.

Knows the file, the budget and the parts; not how they compute. In this order, since each takes from the budget what
the next may have: the driver, dense weights, keys and values, slots for streamed weights, work space; then experts.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler import kernels
from fiddler.cpu.layers import ExpertWeights
from fiddler.cpu.loader import COMPILING, mapped_experts
from fiddler.device.detection import wants_gpu
from fiddler.device.memory_budget import Budget, at_least, shown
from fiddler.device.pinned_mapping import Registration
from fiddler.device.weight_copy import BouncedLink, DirectLink, Link
from fiddler.errors import RequestError, ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.gpu.layers import GpuLinear, GpuNorm, GpuRouter
from fiddler.gpu.memory_layout import Sizes, lay_out, least_room, place
from fiddler.gpu.runner import GpuRunner
from fiddler.host_memory import available_memory
from fiddler.kernels import Product
from fiddler.models.mixtral import Mixtral, rotary_turns
from fiddler.offload.calibration import Calibration, calibrated
from fiddler.offload.feed_forward import Residents
from fiddler.offload.orchestrator import Grouped, Orchestrator
from fiddler.offload.plan import Costs, Curve
from fiddler.offload.staging_ring import Ring
from fiddler.runtime.kv_cache import Sequence as Tokens, kept_bytes
from fiddler.telemetry.recorder import Recorder

__all__ = ["Hybrid", "calibrate_alone", "on_gpu"]

_SLOTS = 3  # of the ring: one is filled while one is used, and one is ready
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
    registration: Registration,
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
    registration.counted()
    budget = Budget(device, gpu_memory)
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    rounded = not exact and experts[0].product.weights == "bf16"
    cache_dtype = torch.float16 if rounded else torch.float32
    sizes = _sizes(model_file, experts, context, cache_dtype)
    _check(budget, sizes, gpu_memory)
    one_token = _one_token(device, notify)
    link = _link(registration, device, notify)
    weights, linears = _dense(model_file, link, width)
    home = Tokens(config, context, cache_dtype, device)
    home.reserve(context)
    with torch.inference_mode():
        turns = torch.view_as_real(rotary_turns(config, torch.arange(context, device=device))).contiguous()
    _warm_up(device, cache_dtype)
    count = sizes.experts
    sizes = replace(sizes, fixed=_WORK)  # the rest is there by now
    layout = lay_out(budget.room(), sizes, count if most is None else min(most, count))
    if layout is None:
        raise _too_little(budget, sizes, gpu_memory)
    chunk, everything, expert_bytes, rows = layout.chunk, not layout.slots, sizes.expert, _slot_rows(hidden)
    ring = Ring(link, experts, 64 if everything else rows, _SLOTS, recorder)
    if everything:
        costs, threads = _NO_COSTS, kernels.set_threads(threads)
    else:
        calibration = calibrated(experts, ring, threads, notify)
        costs, threads = calibration.costs(), kernels.set_threads(calibration.threads)
        if missing == "cpu":
            costs = replace(costs, link=inf)
        elif missing == "stream":
            costs = replace(costs, cpu=Curve((1,), (1e9,)))
    residents = Residents(experts, device)
    placed = place(len(experts), config.expert_count, layout.residents, counts)
    total, done = sum(map(len, placed)) * expert_bytes, 0

    def loaded(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    residents.load(placed, link, loaded)
    budget.settle()
    grouped: Grouped | None = None
    if one_token is not None:
        from fiddler.offload import grouped_kernels as gpu_grouped

        grouped = gpu_grouped.Grouped(device)
    orchestrator = Orchestrator(experts, residents, ring, costs, chunk, _WORK, recorder, grouped)
    linear = GpuLinear(linears, one_token, exact=exact)
    model = Mixtral(config, weights, linear, orchestrator, GpuRouter(one_token), GpuNorm(one_token))
    runner = GpuRunner(
        model, orchestrator.beside, orchestrator.start_over, context, cache_dtype, threads, chunk, home, budget
    )
    if one_token is not None:
        from fiddler.gpu import attention_kernels as gpu_attention
        from fiddler.gpu.decode_graphs import Decoder

        with torch.inference_mode():
            decoder = Decoder(model, orchestrator, home, turns, recorder)
        runner.decode_with(decoder, turns, gpu_attention)
    budget.settle()
    summary = (
        f"{torch.cuda.get_device_name(device)}, {len(residents)} of {count} experts on it, "
        f"{shown(budget.used())} of {shown(budget.total)} used"
    )
    return Hybrid(runner, orchestrator, summary)


def calibrate_alone(
    model_file: ModelFile | None,
    device: str,
    threads: int | None,
    *,
    exact: bool,
    notify: Callable[[str], None],
) -> Calibration:
    """Measure this machine anew, with a model's experts or with some of Mixtral-8x7B's shape, and store the result."""
    gpu, _ = wants_gpu(device, None, notify)
    tier = kernels.choose_tier()
    if model_file is not None:
        experts = mapped_experts(model_file, tier, exact=exact)
    else:
        product = Product(tier, "bf16", "f32" if exact else "bf16")
        size = _SHAPE[0] * _SHAPE[1] * _SHAPE[2]
        if available_memory() < 8 * size:
            raise ResourceError(
                f"{shown(8 * size)} of memory are needed; give a MODEL.gguf, whose weights are measured"
            )
        memory = mmap.mmap(-1, 6 * size)  # shared, as a file's mapping is: else it cannot be registered read-only
        bits = np.frombuffer(memory, np.uint16).reshape(3, *_SHAPE)
        bits[:] = 0x3C00
        experts = [ExpertWeights(bits[0], bits[1], bits[2].reshape(_SHAPE[0], _SHAPE[2], _SHAPE[1]), product)]
    kernels.prepare(experts[0].product, lambda: notify(COMPILING))
    ring = None
    if gpu:
        on = torch.device("cuda", torch.cuda.current_device())
        mappings = model_file.file.mappings if model_file is not None else [(bits.ctypes.data, bits.nbytes)]
        owner, path = (model_file.file, model_file.file.path) if model_file is not None else (memory, None)
        registration = Registration(mappings, path, owner)
        ring = Ring(_link(registration, on, notify), experts, _slot_rows(experts[0].gate.shape[1]), _SLOTS)
    return calibrated(experts, ring, threads, notify, again=True)


def _slot_rows(hidden: int) -> int:
    """Hidden rows of a slot: a whole expert fills the ring."""
    return -(-hidden // (64 * _SLOTS)) * 64


_SHAPE = 4, 14336, 4096  # a few of Mixtral-8x7B's experts
_NO_COSTS = Costs(Curve((1,), (1.0,)), Curve((1,), (1.0,)), 1.0, 0.0)  # nothing is ever missing


def _link(registration: Registration, device: torch.device, notify: Callable[[str], None]) -> Link:
    """The fastest link there is: the mapping itself, where it fits into memory and may be registered."""
    try:
        return DirectLink(device, registration)
    except ResourceError as error:
        notify(f"{error}: reading through buffers")
        return BouncedLink(device)


def _one_token(device: torch.device, notify: Callable[[str], None]) -> ModuleType | None:
    """The kernels for one token, where they run."""
    try:
        from fiddler.gpu import decode_kernels as gpu_kernels
    except ImportError:
        notify("torch came without Triton: single tokens take the slower way through torch")
        return None
    reason = gpu_kernels.works(device)
    if reason is not None:
        notify(f"Triton does not run here ({reason}): single tokens take the slower way through torch")
        return None
    return gpu_kernels


def _dense(model_file: ModelFile, link: Link, width: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Everything but experts, on the GPU: what the model takes by itself, and what it multiplies by."""
    weights: dict[str, Tensor] = {}
    linears: dict[str, Tensor] = {}
    config = model_file.config
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

    def load(name: str, into: Tensor | None = None) -> Tensor:
        values, kind = model_file.bits(name)
        made = torch.empty(values.shape, dtype=kinds[kind], device=link.device) if into is None else into
        link.copy(made.data_ptr(), values.ctypes.data, values.nbytes)
        return made

    for name in ("token_embd.weight", "output_norm.weight"):
        weights[name] = load(name)
    tied = model_file.tied
    linears["output.weight"] = weights["token_embd.weight"] if tied else load("output.weight")
    for layer in range(config.block_count):
        prefix = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm", "ffn_gate_inp"):
            weights[f"{prefix}{name}.weight"] = load(f"{prefix}{name}.weight")
        linears[f"{prefix}attn_output.weight"] = load(f"{prefix}attn_output.weight")
        names = [f"{prefix}attn_{part}.weight" for part in "qkv"]
        found = [model_file.bits(name) for name in names]
        if len({kind for _, kind in found}) == 1:  # side by side, to be one product
            rows = [len(values) for values, _ in found]
            joined = torch.empty(sum(rows), width, dtype=kinds[found[0][1]], device=link.device)
            for name, part in zip(names, joined.split(rows), strict=True):
                linears[name] = load(name, part)
        else:
            linears.update({name: load(name) for name in names})
    arrived = link.mark()
    link.arrive(arrived)
    arrived.synchronize()
    for name, tensor in weights.items():
        if name != "token_embd.weight":
            weights[name] = tensor.float()
    return weights, linears


def _sizes(model_file: ModelFile, experts: Sequence[ExpertWeights], context: int, cache: torch.dtype) -> Sizes:
    """What goes to the GPU, before anything did."""
    config, (_, hidden, width) = model_file.config, experts[0].gate.shape
    tensors = model_file.file.tensors
    names = config.tensor_shapes(tied=model_file.tied)
    dense = sum(tensors[name].nbytes for name in names if not name.endswith("_exps.weight"))
    kept = kept_bytes(config, context, cache, context) + 4 * context * config.head_dim  # and turns, in float32
    return Sizes(
        fixed=dense + kept + _WORK,
        token=width * _ACTIVATIONS,
        slots=Ring.nbytes(width, _slot_rows(hidden), _SLOTS),
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


def _warm_up(device: torch.device, dtype: torch.dtype) -> None:
    """Have the driver load what torch's products and attention need, so that their memory is known."""
    for kind in (torch.bfloat16, torch.float16, torch.float32):
        for tokens in (1, 64, 512):
            F.linear(
                torch.zeros(tokens, 256, dtype=kind, device=device), torch.zeros(256, 256, dtype=kind, device=device)
            )
    q = torch.zeros(1, 8, 64, 64, dtype=dtype, device=device)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    torch.cuda.synchronize(device)
