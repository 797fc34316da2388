"""Measures the costs of an expert on this machine, once: the next start finds them on disk.

Knows what a calibration holds for; not how each side is timed (see `expert_timing`), nor plans.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import torch

from fiddler import kernels
from fiddler.device.detection import wants_gpu
from fiddler.device.memory_budget import shown
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.weight_copy import fastest_copy
from fiddler.errors import RequestError, ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, mapped_experts
from fiddler.host_memory import available_memory
from fiddler.kernels import ExpertMatrices, KernelVariant
from fiddler.kernels.fit_tuning import fit_unknown_cpu
from fiddler.kernels.formats.half import BF16
from fiddler.kernels.machine.cpu import cpu_model
from fiddler.offload.calibration import Calibration, cache_folder, check_store, read_calibration, store
from fiddler.offload.expert_timing import BothSides, CpuSide
from fiddler.offload.gpu_side import Grouped, prompt_decode_bytes
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows

__all__ = ["calibrate_alone", "calibrated", "measure"]
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_GPU_TOKENS = (1, 16, 128, 512, 2048)
_FEW_CORES = 4  # up to this many, a free core costs much


def calibrated(
    layers: Sequence[ExpertWeights],
    ring: Ring | None,
    threads: int | None,
    notify: Callable[[str], None],
    *,
    k: int,
    grouped: Grouped | None = None,
    again: bool = False,
) -> Calibration:
    """The calibration for this machine, these kernels and experts of this shape: from disk, or measured now.

    ring: stages streamed weights on the GPU, None where there is no GPU. threads: the number to use, or None for the
    fastest of those that leave the GPU's driver a core or two. k: experts that each token chooses. grouped: computes
    several experts on the GPU at once; None: torch does, one by one. again: measure even if the disk has a result, and
    raise ResourceError where the new one cannot be stored, which is a warning else.
    """
    machine = _machine(layers, ring, threads, k, grouped)
    path = cache_folder() / f"calibration-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    cached = None if again else read_calibration(path)
    if cached is not None and cached.machine == machine:
        return cached
    if again:
        check_store(path)
    notify("measuring this machine's CPU and PCIe link; the next start finds the result on disk")
    calibration = measure(layers, ring, threads, machine, k, grouped)
    try:
        store(calibration, path)
    except ResourceError as error:
        if again:
            raise
        notify(f"warning: {error}")
    return calibration


def _machine(
    layers: Sequence[ExpertWeights], ring: Ring | None, threads: int | None, k: int, grouped: Grouped | None
) -> str:
    """Hardware, kernels and shape for which a calibration is valid, in one line."""
    gpu = "no GPU"
    if ring is not None:
        device = ring.weight_copy.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU as a GPU"
        gpu = f"{name}, {ring.weight_copy.kind}, {'torch' if grouped is None else 'Triton'}"
        if grouped is not None and grouped.decoded_bytes:
            gpu += f", {shown(grouped.decoded_bytes)} for decoded experts"
    variant, (_, hidden, width) = layers[0].variant, layers[0].shape
    weights = " and ".join(dict.fromkeys(each.name for each in layers[0].matrix_formats))
    thread_count = kernels.set_threads(None) if threads is None else threads
    return (
        f"{cpu_model()}, {'up to ' if threads is None else ''}{thread_count} threads; {gpu}; "
        f"{variant.tier.name}, {weights} weights, {variant.activations} activations, "
        f"tuned for {variant.tuning.name}, D {width}, F {hidden}, top {k}"
    )


def measure(
    layers: Sequence[ExpertWeights],
    ring: Ring | None,
    threads: int | None,
    machine: str,
    k: int,
    grouped: Grouped | None = None,
) -> Calibration:
    """Measure with these layers' weights; takes seconds. machine: stored with the result. Others: see `calibrated`."""
    expert_bytes = layers[0].expert_bytes
    max_threads = kernels.set_threads(threads)
    if ring is None:
        side = CpuSide(layers, k)
        seconds = tuple(side.cpu(tokens) for tokens in _TOKENS)
        return Calibration(machine, max_threads, expert_bytes, _TOKENS, seconds, seconds, side.cpu_split())
    sides = BothSides(layers, k, ring, grouped)
    copy_alone = sides.copy()
    speeds = {}
    free_cores = (1, 2) if max_threads > _FEW_CORES else (0, 1)  # for the thread that drives the GPU
    for count in {max_threads} if threads is not None else {max(1, max_threads - cores) for cores in free_cores}:
        kernels.set_threads(count)
        speeds[count] = sum(1 / seconds for seconds in sides.together(1, copy_alone)[:2])
    fastest = kernels.set_threads(max(speeds, key=lambda count: speeds[count]))
    points = [sides.together(tokens, copy_alone) for tokens in _TOKENS]
    return Calibration(
        machine,
        fastest,
        expert_bytes,
        _TOKENS,
        tuple(cpu for cpu, _, _ in points),
        tuple(alone for _, _, alone in points),
        sides.cpu_split(),
        _GPU_TOKENS,
        tuple(sides.gpu(tokens) for tokens in _GPU_TOKENS),
        median(copy for _, copy, _ in points[:4]),
        copy_alone,
        sides.copy_split(copy_alone),
    )


def calibrate_alone(
    model_file: ModelFile | None,
    device: str,
    threads: int | None,
    *,
    exact: bool,
    notify: Callable[[str], None],
) -> Calibration:
    """Measure this machine anew and store the result; without a model, with some experts of Mixtral-8x7B's shape.

    Raises RequestError for a model without experts.
    """
    gpu, _ = wants_gpu(device, None, notify)
    tier = kernels.choose_tier()
    fit_unknown_cpu(notify)
    if model_file is not None:
        if not model_file.config.architecture.has_experts:
            raise RequestError(f"{model_file.file.shown_path} has no experts, so there is nothing to calibrate")
        experts = mapped_experts(model_file, tier, exact=exact)
    else:
        variant = KernelVariant(tier, BF16.name, "f32" if exact else BF16.partner)
        matrix_bytes = BF16.row_bytes(_SHAPE[0] * _SHAPE[1] * _SHAPE[2])
        if available_memory() < 4 * matrix_bytes:
            raise ResourceError(
                f"{shown(4 * matrix_bytes)} of memory are needed; give a MODEL.gguf, to measure with its weights"
            )
        memory = mmap.mmap(-1, 3 * matrix_bytes)  # shared, as a file's mapping is: else it cannot be pinned read-only
        bits = np.frombuffer(memory, np.uint16).reshape(3, *_SHAPE)
        bits[:] = 0x3C00
        stacks = bits[0], bits[1], bits[2].reshape(_SHAPE[0], _SHAPE[2], _SHAPE[1])
        gate, up, down = map(ExpertMatrices.of, stacks)
        experts = [ExpertWeights(gate, up, down, variant)]
    kernels.precompile(set(experts[0].variants), notify)
    ring = grouped = None
    if gpu:
        cuda = torch.device("cuda", torch.cuda.current_device())
        mappings = model_file.file.mappings if model_file is not None else [(bits.ctypes.data, bits.nbytes)]
        owner, path = (model_file.file, model_file.file.path) if model_file is not None else (memory, None)
        pinned = PinnedMapping(mappings, path, owner)
        ring = Ring(fastest_copy(pinned, cuda, notify), experts, slot_rows(experts), SLOTS)
        spare = torch.cuda.mem_get_info(cuda)[0]
        grouped = _grouped_kernels(cuda, prompt_decode_bytes(experts, spare, exact=exact))
    k = _K if model_file is None else model_file.config.expert_used_count
    return calibrated(experts, ring, threads, notify, k=k, grouped=grouped, again=True)


def _grouped_kernels(device: torch.device, nbytes: int) -> Grouped | None:
    """Triton's kernels for several tokens, where Triton runs. nbytes: see `gpu_side.prompt_decode_bytes`."""
    try:
        from fiddler.offload import grouped_kernels

        grouped = grouped_kernels.Grouped(device, nbytes)
        grouped.add_from_host(torch.zeros(16, device=device), torch.zeros(16, pin_memory=True))
        torch.cuda.synchronize(device)
    except Exception:  # noqa: BLE001 - a missing compiler, driver or architecture raises anything; torch computes then
        return None
    return grouped


_SHAPE = 4, 14336, 4096  # [E, F, D], a few of Mixtral-8x7B's experts
_K = 2  # of them, each token's
