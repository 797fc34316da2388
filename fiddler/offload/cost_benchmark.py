"""Measures the time of an expert on this machine: CPU kernels, GPU and host-to-device copies, alone and together.

Knows kernels, copies and a clock; not plans. Both sides are measured the way they will be used: the CPU's kernels
while the copies run, and the copies while the CPU computes, since both read the same memory.
"""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from statistics import median

import numpy as np
import torch

from fiddler import kernels
from fiddler.device.detection import wants_gpu
from fiddler.device.memory_budget import shown
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.weight_copy import Event, fastest_copy
from fiddler.errors import RequestError, ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, mapped_experts
from fiddler.host_memory import available_memory, populate
from fiddler.kernels import KernelVariant
from fiddler.kernels.fit_tuning import fit_unknown_cpu
from fiddler.kernels.formats.half import BF16
from fiddler.kernels.machine.cpu import cpu_model
from fiddler.offload.calibration import Calibration, cache_folder, check_store, read_calibration, store
from fiddler.offload.feed_forward import feed_forward, torch_type
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows

__all__ = ["calibrate_alone", "calibrated", "measure"]
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_GPU_TOKENS = (1, 16, 128, 512, 2048)
_FEW_CORES = 4  # up to this many, a free core costs much
_MIN_SECONDS = 0.04  # of one timed run
_COPY_FACTOR = 2.5  # the queued copies take this many times the CPU's time
_MAX_BYTES = 1 << 33  # of the weights to measure with: far more than any cache holds
_MEMORY_FRACTION = 0.25  # of the available memory for these weights: none of them may be read from disk meanwhile


def calibrated(
    layers: Sequence[ExpertWeights],
    ring: Ring | None,
    threads: int | None,
    notify: Callable[[str], None],
    *,
    again: bool = False,
) -> Calibration:
    """The calibration for this machine, these kernels and experts of this shape: from disk, or measured now.

    ring: stages streamed weights on the GPU, None where there is no GPU. threads: the number to use, or None for the
    fastest of those that leave the GPU's driver a core or two. again: measure even if the disk has a result, and raise
    ResourceError where the new one cannot be stored, which is a warning else.
    """
    machine = _machine(layers, ring, threads)
    path = cache_folder() / f"calibration-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    cached = None if again else read_calibration(path)
    if cached is not None and cached.machine == machine:
        return cached
    if again:
        check_store(path)
    notify("measuring this machine's CPU and PCIe link; the next start finds the result on disk")
    calibration = measure(layers, ring, threads, machine)
    try:
        store(calibration, path)
    except ResourceError as error:
        if again:
            raise
        notify(f"warning: {error}")
    return calibration


def _machine(layers: Sequence[ExpertWeights], ring: Ring | None, threads: int | None) -> str:
    """Hardware, kernels and shape for which a calibration is valid, in one line."""
    gpu = "no GPU"
    if ring is not None:
        device = ring.weight_copy.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU as a GPU"
        gpu = f"{name}, {ring.weight_copy.kind}"
    variant, (_, hidden, width) = layers[0].variant, layers[0].gate.shape
    thread_count = kernels.set_threads(None) if threads is None else threads
    return (
        f"{cpu_model()}, {'up to ' if threads is None else ''}{thread_count} threads; {gpu}; "
        f"{variant.tier.name}, {variant.weights} weights, {variant.activations} activations, "
        f"tuned for {variant.tuning.name}, D {width}, F {hidden}"
    )


def measure(layers: Sequence[ExpertWeights], ring: Ring | None, threads: int | None, machine: str) -> Calibration:
    """Measure with these layers' weights; takes seconds. machine: stored with the result."""
    expert_bytes = layers[0].expert_bytes
    max_threads = kernels.set_threads(threads)
    if ring is None:
        cpu_bench = _CpuBench(layers)
        seconds = tuple(cpu_bench.cpu(tokens) for tokens in _TOKENS)
        return Calibration(machine, max_threads, expert_bytes, _TOKENS, seconds, seconds[0])
    bench = _Bench(layers, ring)
    copy_alone = bench.copy()
    speeds = {}
    free_cores = (1, 2) if max_threads > _FEW_CORES else (0, 1)  # for the thread that drives the GPU
    for count in {max_threads} if threads is not None else {max(1, max_threads - cores) for cores in free_cores}:
        kernels.set_threads(count)
        speeds[count] = sum(1 / seconds for seconds in bench.together(1, copy_alone))
    fastest = kernels.set_threads(max(speeds, key=lambda count: speeds[count]))
    cpu_alone = bench.cpu(1)
    points = [bench.together(tokens, copy_alone) for tokens in _TOKENS]
    return Calibration(
        machine,
        fastest,
        expert_bytes,
        _TOKENS,
        tuple(cpu for cpu, _ in points),
        cpu_alone,
        _GPU_TOKENS,
        tuple(bench.gpu(tokens) for tokens in _GPU_TOKENS),
        median(copy for _, copy in points[:4]),
        copy_alone,
    )


def _in_memory(layers: Sequence[ExpertWeights]) -> tuple[Sequence[ExpertWeights], int]:
    """Reads into memory the experts to measure with; returns their layers, and the number of experts of each.

    A file on disk may be larger than memory: its disk's speed is no property of kernels or copies.
    """
    expert_bytes, experts = layers[0].expert_bytes, len(layers[0].gate)
    max_experts = int(min(_MAX_BYTES, _MEMORY_FRACTION * (available_memory() or inf)) // expert_bytes)
    if max_experts < experts:
        layers, experts = layers[:1], max(1, max_experts)
    else:
        layers = layers[: max_experts // experts]
    for weights in layers:
        for matrices in (weights.gate, weights.up, weights.down):
            first, last = (matrices[e].ctypes.data for e in (0, experts - 1))
            begin = first - first % mmap.PAGESIZE
            populate(begin, last + matrices[0].nbytes - begin)
    return layers, experts


class _CpuBench:
    """Times the CPU's kernels, each run on another layer: no weights are read from a cache."""

    def __init__(self, layers: Sequence[ExpertWeights]) -> None:
        self._layers, self._experts = _in_memory(layers)
        _, self._hidden, self._width = layers[0].gate.shape
        self._rng = np.random.default_rng(0)
        self._runs = 0

    def _run(self, tokens: int) -> None:
        """Compute every expert of the next layer, each with `tokens` tokens."""
        self._runs += 1
        weights = self._layers[-1 - self._runs % len(self._layers)]
        x = self._rng.standard_normal((tokens, self._width), np.float32)
        expert_ids = np.tile(np.arange(self._experts), (tokens, 1))
        routing_weights = np.ones((tokens, self._experts), np.float32)
        kernels.expert_ffn(x, expert_ids, routing_weights, weights.gate, weights.up, weights.down, weights.variant)

    def cpu(self, tokens: int) -> float:
        """Seconds an expert while nothing else runs: the median of several runs."""
        self._run(tokens)
        samples: list[float] = []
        while len(samples) < 3 or sum(samples) < _MIN_SECONDS / self._experts:
            started = time.perf_counter()
            self._run(tokens)
            samples.append((time.perf_counter() - started) / self._experts)
        return median(samples)


class _Bench(_CpuBench):
    """Times both sides, alone and together."""

    def __init__(self, layers: Sequence[ExpertWeights], ring: Ring) -> None:
        super().__init__(layers)
        self._ring = ring
        self._sent = 0
        device = ring.weight_copy.device
        initializer = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._copy_thread = ThreadPoolExecutor(1, "", *initializer)
        self._parts = -(-self._hidden // ring.rows)  # of an expert

    def _send(self, experts: int) -> list[Event]:
        """Queue copies of `experts` whole experts; an event after each of their parts."""
        events = []
        for _ in range(experts):
            layer = self._sent // self._experts % len(self._layers)
            for part in self._ring.send(layer, self._sent % self._experts, 0, self._hidden):
                self._ring.done(part)
                events.append(self._ring.weight_copy.event())
                self._ring.weight_copy.arrive(events[-1])
            self._sent += 1
        return events

    def copy(self) -> float:
        """Seconds to copy an expert while nothing else runs."""
        self._send(1)[-1].synchronize()
        count, seconds = 1, 0.0
        while seconds < _MIN_SECONDS:
            count *= 2
            started = time.perf_counter()
            self._send(count)[-1].synchronize()
            seconds = time.perf_counter() - started
        return seconds / count

    def together(self, tokens: int, copy_alone: float) -> tuple[float, float]:
        """Seconds an expert, of the CPU and of the copies, at the same time: the copies outlast the CPU's runs."""
        alone = self.cpu(tokens) * self._experts
        runs = max(1, round(_MIN_SECONDS / alone))
        cpu, copies = [], []
        for _ in range(3):
            started = time.perf_counter()
            queueing = self._copy_thread.submit(self._send, max(1, round(_COPY_FACTOR * runs * alone / copy_alone)))
            if not self._ring.weight_copy.blocks:
                queueing.result()
            begun = time.perf_counter()
            for _ in range(runs):
                self._run(tokens)
            computed = ended = time.perf_counter()
            events = queueing.result()
            arrived = sum(event.query() for event in events)
            if self._ring.weight_copy.blocks:  # all parts have arrived by now
                ended = time.perf_counter()
            events[-1].synchronize()
            cpu.append((computed - begun) / runs / self._experts)
            copies.append((ended - started) * self._parts / max(1, arrived))
        return median(cpu), median(copies)

    def gpu(self, tokens: int) -> float:
        """Seconds to compute an expert on the GPU, from weights in its memory."""
        weights, rows = self._layers[0], min(self._ring.rows, self._hidden)
        dtype, rounded = torch_type(weights), weights.variant.activations == "bf16"
        (part,) = self._ring.send(0, 0, 0, rows)
        matrices = part.matrices(dtype)
        x = torch.ones(
            tokens, self._width, dtype=dtype if rounded else torch.float32, device=self._ring.weight_copy.device
        )
        done, samples = self._ring.weight_copy.event(), []
        part.arrived.wait()
        for _ in range(4):
            started = time.perf_counter()
            feed_forward(x, *matrices, rounded=rounded, work=1 << 27)
            done.record()
            done.synchronize()
            samples.append(time.perf_counter() - started)
        self._ring.done(part)
        return float(median(samples[1:]) * self._hidden / rows)


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
        experts = [ExpertWeights(bits[0], bits[1], bits[2].reshape(_SHAPE[0], _SHAPE[2], _SHAPE[1]), variant)]
    kernels.precompile(experts[0].variant, notify)
    ring = None
    if gpu:
        cuda = torch.device("cuda", torch.cuda.current_device())
        mappings = model_file.file.mappings if model_file is not None else [(bits.ctypes.data, bits.nbytes)]
        owner, path = (model_file.file, model_file.file.path) if model_file is not None else (memory, None)
        pinned = PinnedMapping(mappings, path, owner)
        ring = Ring(fastest_copy(pinned, cuda, notify), experts, slot_rows(experts[0].gate.shape[1]), SLOTS)
    return calibrated(experts, ring, threads, notify, again=True)


_SHAPE = 4, 14336, 4096  # [E, F, D], a few of Mixtral-8x7B's experts
