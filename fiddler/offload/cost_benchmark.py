"""Measures what an expert costs on this machine: CPU kernels, GPU and the copies, alone and together.

Knows kernels, copies and a clock; not plans. Both sides are measured the way they will be used: the CPU's kernels
while the copies run, and the copies while the CPU computes, since both read the same memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fiddler import kernels
from fiddler.device.detection import wants_gpu
from fiddler.device.memory_budget import shown
from fiddler.device.pinned_mapping import PinnedMapping
from fiddler.device.weight_copy import Event, fastest_copy
from fiddler.errors import ResourceError
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import ExpertWeights, mapped_experts
from fiddler.host_memory import available_memory, populate
from fiddler.kernels import KernelVariant
from fiddler.kernels.precompile import COMPILING
from fiddler.offload.calibration import Calibration, cache_folder, read_calibration
from fiddler.offload.feed_forward import feed_forward, torch_type
from fiddler.offload.staging_ring import SLOTS, Ring, slot_rows

__all__ = ["calibrate_alone", "calibrated", "measure"]
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_GPU_TOKENS = (1, 16, 128, 512, 2048)
_FEW_CORES = 4  # of which one is much to leave
_AT_LEAST = 0.04  # seconds that are timed in one piece
_ENOUGH = 2.5  # times the CPU's time, that the link is given work for
_MEASURED = 1 << 33  # bytes of weights that are measured on, at most: far more than any cache holds
_SHARE = 0.25  # of the memory that could be had, that they may take: none is to be read from disk meanwhile


def calibrated(
    layers: Sequence[ExpertWeights],
    ring: Ring | None,
    threads: int | None,
    notify: Callable[[str], None],
    *,
    again: bool = False,
) -> Calibration:
    """What was measured for this machine, these kernels and experts of this shape; measured now if it never was.

    ring: where the GPU takes streamed weights, None where there is no GPU. threads: the number to use, or None for
    the best of those that leave the GPU's driver a core or two.
    """
    machine = _machine(layers, ring, threads)
    path = cache_folder() / f"calibration-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"
    found = None if again else read_calibration(path)
    if found is not None and found.machine == machine:
        return found
    notify("measuring this machine's CPU and link; the next start finds the result on disk")
    made = measure(layers, ring, threads, machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(made), indent=1))
        part.replace(path)
    except OSError as error:
        notify(f"warning: {path}: the calibration cannot be kept: {error.strerror}")
    return made


def _machine(layers: Sequence[ExpertWeights], ring: Ring | None, threads: int | None) -> str:
    """What a result holds for, in one line."""
    gpu = "no GPU"
    if ring is not None:
        device = ring.weight_copy.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU as a GPU"
        gpu = f"{name}, {type(ring.weight_copy).__name__}"
    variant, (_, hidden, width) = layers[0].variant, layers[0].gate.shape
    wanted = kernels.set_threads(None) if threads is None else threads
    return (
        f"{_cpu_name()}, {'up to ' if threads is None else ''}{wanted} threads; {gpu}; "
        f"{variant.tier.name}, {variant.weights} weights, {variant.activations} activations, D {width}, F {hidden}"
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def measure(layers: Sequence[ExpertWeights], ring: Ring | None, threads: int | None, machine: str) -> Calibration:
    """Measure on these layers' weights; takes seconds."""
    size = 3 * layers[0].gate[0].nbytes
    most = kernels.set_threads(threads)
    if ring is None:
        bench = _CpuBench(layers)
        seconds = tuple(bench.cpu(tokens) for tokens in _TOKENS)
        return Calibration(machine, most, size, _TOKENS, seconds, seconds[0])
    both = _Bench(layers, ring)
    copy_alone = both.weight_copy()
    speeds = {}
    left = (1, 2) if most > _FEW_CORES else (0, 1)  # to the thread that drives the GPU
    for count in {most} if threads is not None else {max(1, most - cores) for cores in left}:
        kernels.set_threads(count)
        speeds[count] = sum(1 / seconds for seconds in both.together(1, copy_alone))
    chosen = kernels.set_threads(max(speeds, key=lambda count: speeds[count]))
    cpu_alone = both.cpu(1)
    points = [both.together(tokens, copy_alone) for tokens in _TOKENS]
    return Calibration(
        machine,
        chosen,
        size,
        _TOKENS,
        tuple(cpu for cpu, _ in points),
        cpu_alone,
        _GPU_TOKENS,
        tuple(both.gpu(tokens) for tokens in _GPU_TOKENS),
        median(weight_copy for _, weight_copy in points[:4]),
        copy_alone,
    )


def _in_memory(layers: Sequence[ExpertWeights]) -> tuple[Sequence[ExpertWeights], int]:
    """As many layers as are measured on, and how many experts of each; they are in memory then.

    A file on disk may be larger than memory: what its disk gives is no property of kernels or links.
    """
    size, experts = 3 * layers[0].gate[0].nbytes, len(layers[0].gate)
    room = int(min(_MEASURED, _SHARE * (available_memory() or inf)) // size)  # experts
    if room < experts:
        layers, experts = layers[:1], max(1, room)
    else:
        layers = layers[: room // experts]
    for weights in layers:
        for matrices in (weights.gate, weights.up, weights.down):
            first, last = (matrices[e].ctypes.data for e in (0, experts - 1))
            begin = first - first % mmap.PAGESIZE
            populate(begin, last + matrices[0].nbytes - begin)
    return layers, experts


class _CpuBench:
    """Times the CPU's kernels; layers take turns, so that nothing is read from a cache."""

    def __init__(self, layers: Sequence[ExpertWeights]) -> None:
        self._layers, self._experts = _in_memory(layers)
        _, self._hidden, self._width = layers[0].gate.shape
        self._rng = np.random.default_rng(0)
        self._turn = 0

    def _run(self, tokens: int) -> None:
        """Every expert of a layer, each with so many tokens."""
        self._turn += 1
        weights = self._layers[-1 - self._turn % len(self._layers)]
        x = self._rng.standard_normal((tokens, self._width), np.float32)
        ids = np.tile(np.arange(self._experts), (tokens, 1))
        share = np.ones((tokens, self._experts), np.float32)
        kernels.expert_ffn(x, ids, share, weights.gate, weights.up, weights.down, weights.variant)

    def cpu(self, tokens: int) -> float:
        """Seconds an expert, nothing else going on: the median of several."""
        self._run(tokens)
        samples: list[float] = []
        while len(samples) < 3 or sum(samples) < _AT_LEAST / self._experts:
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
        cuda = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._aside = ThreadPoolExecutor(1, "", *cuda)
        self._parts = -(-self._hidden // ring.rows)  # of an expert

    def _send(self, experts: int) -> list[Event]:
        """Queue so many whole experts on the link; a mark after each of their parts."""
        events = []
        for _ in range(experts):
            layer = self._sent // self._experts % len(self._layers)
            for part in self._ring.send(layer, self._sent % self._experts, 0, self._hidden):
                self._ring.done(part)
                events.append(self._ring.weight_copy.event())
                self._ring.weight_copy.arrive(events[-1])
            self._sent += 1
        return events

    def weight_copy(self) -> float:
        """Seconds an expert, nothing else going on."""
        self._send(1)[-1].synchronize()
        count, seconds = 1, 0.0
        while seconds < _AT_LEAST:
            count *= 2
            started = time.perf_counter()
            self._send(count)[-1].synchronize()
            seconds = time.perf_counter() - started
        return seconds / count

    def together(self, tokens: int, copy_alone: float) -> tuple[float, float]:
        """Seconds an expert of the CPU and of the link, both at work: the link has more than enough to do."""
        alone = self.cpu(tokens) * self._experts
        runs = max(1, round(_AT_LEAST / alone))
        cpu, weight_copy = [], []
        for _ in range(3):
            started = time.perf_counter()
            sending = self._aside.submit(self._send, max(1, round(_ENOUGH * runs * alone / copy_alone)))
            if not self._ring.weight_copy.blocks:
                sending.result()
            begun = time.perf_counter()
            for _ in range(runs):
                self._run(tokens)
            computed = ended = time.perf_counter()
            events = sending.result()
            arrived = sum(event.query() for event in events)
            if self._ring.weight_copy.blocks:  # all of them, by now
                ended = time.perf_counter()
            events[-1].synchronize()
            cpu.append((computed - begun) / runs / self._experts)
            weight_copy.append((ended - started) * self._parts / max(1, arrived))
        return median(cpu), median(weight_copy)

    def gpu(self, tokens: int) -> float:
        """Seconds that the GPU computes on an expert that is there."""
        weights, rows = self._layers[0], min(self._ring.rows, self._hidden)
        kind, rounded = torch_type(weights), weights.variant.activations == "bf16"
        (part,) = self._ring.send(0, 0, 0, rows)
        matrices = part.matrices(kind)
        x = torch.ones(
            tokens, self._width, dtype=kind if rounded else torch.float32, device=self._ring.weight_copy.device
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
    """Measure this machine anew, with a model's experts or with some of Mixtral-8x7B's shape, and store the result."""
    gpu, _ = wants_gpu(device, None, notify)
    tier = kernels.choose_tier()
    if model_file is not None:
        experts = mapped_experts(model_file, tier, exact=exact)
    else:
        variant = KernelVariant(tier, "bf16", "f32" if exact else "bf16")
        size = _SHAPE[0] * _SHAPE[1] * _SHAPE[2]
        if available_memory() < 8 * size:
            raise ResourceError(
                f"{shown(8 * size)} of memory are needed; give a MODEL.gguf, whose weights are measured"
            )
        memory = mmap.mmap(-1, 6 * size)  # shared, as a file's mapping is: else it cannot be registered read-only
        bits = np.frombuffer(memory, np.uint16).reshape(3, *_SHAPE)
        bits[:] = 0x3C00
        experts = [ExpertWeights(bits[0], bits[1], bits[2].reshape(_SHAPE[0], _SHAPE[2], _SHAPE[1]), variant)]
    kernels.precompile(experts[0].variant, lambda: notify(COMPILING))
    ring = None
    if gpu:
        on = torch.device("cuda", torch.cuda.current_device())
        mappings = model_file.file.mappings if model_file is not None else [(bits.ctypes.data, bits.nbytes)]
        owner, path = (model_file.file, model_file.file.path) if model_file is not None else (memory, None)
        pinned = PinnedMapping(mappings, path, owner)
        ring = Ring(fastest_copy(pinned, on, notify), experts, slot_rows(experts[0].gate.shape[1]), SLOTS)
    return calibrated(experts, ring, threads, notify, again=True)


_SHAPE = 4, 14336, 4096  # a few of Mixtral-8x7B's experts
