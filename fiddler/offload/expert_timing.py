"""Times an expert on each side: CPU kernels, GPU products and host-to-device copies, alone and together.

Knows kernels, copies and a clock; not plans. Each side is timed the way it will be used: as many experts in one call as
a step of that many tokens chooses, copies queued slot by slot, and the CPU's kernels while the copies run, and the
copies while the CPU computes, since both read the same memory.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import inf
from statistics import median

import numpy as np
import torch

from fiddler.device.weight_copy import Event
from fiddler.files.weights import ExpertWeights
from fiddler.host_memory import available_memory, populate
from fiddler.offload.expert_cache import Residents
from fiddler.offload.feed_forward import torch_type
from fiddler.offload.gpu_side import GpuSide, Grouped, SortedInputs
from fiddler.offload.staging_ring import Ring, RowRange
from fiddler.telemetry.recorder import SILENT

__all__ = ["BothSides", "CpuSide"]

_MIN_SECONDS = 0.04  # of one timed run
_COPY_FACTOR = 2.5  # the queued copies take this many times the CPU's time
_MAX_BYTES = 1 << 33  # of the weights to measure with: far more than any cache holds
_MEMORY_FRACTION = 0.25  # of the available memory for these weights: none of them may be read from disk meanwhile
_GPU_LAUNCHES = 4  # queued one after the other, as in a prompt
_WORKSPACE_BYTES = 1 << 27


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
            for address in matrices.addresses[:experts].tolist():
                begin = address - address % mmap.PAGESIZE
                populate(begin, address + matrices.expert_bytes - begin)
    return layers, experts


def _half(hidden: int, block: int) -> int:
    """About half of an expert's hidden rows, whole blocks of down; all where it is one block."""
    step = max(64, block)
    if block == 1:
        return max(2, hidden // 2 // step * step or hidden // 4 * 2)
    return hidden // 2 // step * step or hidden // block // 2 * block or hidden


class CpuSide:
    """Times the CPU's kernels, each run on other experts: no weights are read from a cache."""

    def __init__(self, layers: Sequence[ExpertWeights], k: int) -> None:
        """k: experts that each token chooses."""
        self._layers, self._experts = _in_memory(layers)
        self._ffn = [w.ffn() for w in self._layers]
        self._all_experts, self._hidden, self._width = layers[0].shape
        self._k = k
        self._inputs: dict[int, np.ndarray] = {}
        self._next = 0  # expert
        # hidden rows of an expert split in the middle
        self._half = _half(self._hidden, max(w.split_rows for w in self._layers))

    def _experts_of(self, tokens: int) -> int:
        """Experts of a call where each has `tokens` tokens: those of a step in which every expert has so many."""
        return min(self._experts, tokens * self._k)

    def _run(self, tokens: int, experts: int, rows: int | None = None) -> None:
        """Compute the next experts of a layer, each with `tokens` tokens; rows: their hidden rows, None for all."""
        if self._next + experts > self._experts * len(self._layers):
            self._next = 0
        layer, first = divmod(self._next, self._experts)
        first = min(first, self._experts - experts)
        self._next += experts
        if tokens not in self._inputs:
            self._inputs[tokens] = np.random.default_rng(0).standard_normal((tokens, self._width), np.float32)
        x = self._inputs[tokens]
        expert_ids = np.tile(np.arange(first, first + experts), (tokens, 1))
        routing_weights = np.ones((tokens, experts), np.float32)
        hidden_rows = None if rows is None else np.full(self._all_experts, rows, np.int64)
        self._ffn[-1 - layer](x, expert_ids, routing_weights, hidden_rows)

    def _seconds(self, tokens: int, experts: int, rows: int | None = None) -> float:
        started = time.perf_counter()
        self._run(tokens, experts, rows)
        return time.perf_counter() - started

    def cpu(self, tokens: int) -> float:
        """Seconds an expert while nothing else runs: the median of several runs."""
        experts = self._experts_of(tokens)
        self._run(tokens, experts)
        samples: list[float] = []
        while len(samples) < 3 or sum(samples) < _MIN_SECONDS:
            samples.append(self._seconds(tokens, experts))
        return median(samples) / experts

    def cpu_split(self) -> float:
        """Seconds by which a part of an expert, with one token, takes longer than its share of a whole one."""
        whole = min(self._k, self._experts // 2)
        if whole == 0:
            return 0.0
        samples: list[tuple[float, float]] = []
        while len(samples) < 5 or sum(map(sum, samples)) < _MIN_SECONDS:  # in turns: the memory's speed changes
            samples.append((self._seconds(1, whole), self._seconds(1, 2 * whole, self._half)))
        quickest, quickest_halves = map(min, zip(*samples, strict=True))  # others were disturbed, by more than a split
        return float(max(0.0, quickest_halves / (2 * whole) - self._half / self._hidden * quickest / whole))


class BothSides(CpuSide):
    """Times both sides, alone and together."""

    def __init__(self, layers: Sequence[ExpertWeights], k: int, ring: Ring, grouped: Grouped | None) -> None:
        """grouped: computes several experts on the GPU at once; None: torch does, one by one."""
        super().__init__(layers, k)
        self._ring = ring
        self._sent = 0
        device = ring.weight_copy.device
        initializer = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._copy_thread = ThreadPoolExecutor(1, "", *initializer)
        self._gpu_side = GpuSide(Residents(layers, device), ring, _WORKSPACE_BYTES, SILENT, grouped)

    def _send(self, experts: int, begin: int = 0) -> list[tuple[Event, float]]:
        """Queue copies of so many experts, without their first `begin` hidden rows.

        Returns an event after each slot of the ring, and how many of these experts it completes.
        """
        events, weight_copy = [], self._ring.weight_copy
        while experts > 0:
            layer, first = divmod(self._sent % (self._experts * len(self._layers)), self._experts)
            count = min(experts, self._experts - first)
            ranges: list[RowRange] = [(e, begin, self._hidden) for e in range(first, first + count)]
            for parts in self._ring.send(layer, ranges):
                self._ring.done(parts)
                events.append((weight_copy.event(), sum(p.end - p.begin for p in parts) / (self._hidden - begin)))
                weight_copy.arrive(events[-1][0])
            self._sent += count
            experts -= count
        return events

    def _copy_seconds(self, experts: int, begin: int = 0) -> float:
        started = time.perf_counter()
        self._send(experts, begin)[-1][0].synchronize()
        return time.perf_counter() - started

    def copy(self) -> float:
        """Seconds to copy an expert while nothing else runs."""
        self._copy_seconds(1)
        count, seconds = 1, 0.0
        while seconds < _MIN_SECONDS:
            count *= 2
            seconds = self._copy_seconds(count)
        return seconds / count

    def copy_split(self, copy_alone: float) -> float:
        """Seconds by which copying a part of an expert takes longer than its share of a whole one."""
        count, begin = max(2, round(_MIN_SECONDS / copy_alone)), self._hidden - self._half
        samples = [(self._copy_seconds(count), self._copy_seconds(count, begin)) for _ in range(5)]
        quickest, quickest_halves = map(min, zip(*samples, strict=True))
        return float(max(0.0, quickest_halves - self._half / self._hidden * quickest) / count)

    def together(self, tokens: int, copy_alone: float) -> tuple[float, float, float]:
        """Seconds an expert, of the CPU and of the copies at the same time, and of the CPU alone.

        The copies outlast the CPU's runs.
        """
        experts, cpu_alone = self._experts_of(tokens), self.cpu(tokens)
        alone, weight_copy = cpu_alone * experts, self._ring.weight_copy
        runs = max(1, round(_MIN_SECONDS / alone))
        cpu, copies = [], []
        for _ in range(3):
            started = time.perf_counter()
            queueing = self._copy_thread.submit(self._send, max(1, round(_COPY_FACTOR * runs * alone / copy_alone)))
            if not weight_copy.blocks:
                queueing.result()
            begun = time.perf_counter()
            for _ in range(runs):
                self._run(tokens, experts)
            computed = ended = time.perf_counter()
            events = queueing.result()
            arrived = sum(count for event, count in events if event.query())
            if weight_copy.blocks:  # all have arrived by now
                ended = time.perf_counter()
            events[-1][0].synchronize()
            cpu.append((computed - begun) / runs / experts)
            copies.append((ended - started) / max(events[0][1], arrived))
        return median(cpu), median(copies), cpu_alone

    def gpu(self, tokens: int) -> float:
        """Seconds to compute an expert on the GPU, from weights in its memory: a slot of the ring at once."""
        w, device = self._layers[0], self._ring.weight_copy.device
        rounded = w.variant.activations != "f32"
        parts = next(self._ring.send(0, [(e, 0, self._hidden) for e in range(self._experts)]))
        count, share = len(parts), sum(part.end - part.begin for part in parts) / self._hidden
        x = torch.ones(tokens, self._width, dtype=torch_type(w) if rounded else torch.float32, device=device)
        inputs = SortedInputs(
            x,
            torch.arange(tokens, device=device).repeat(count),
            torch.ones(count * tokens, device=device),
            np.minimum(np.arange(self._all_experts + 1), count) * tokens,
            w,
            rounded,
            torch.zeros(tokens, self._width, device=device),
        )
        done, samples = self._ring.weight_copy.event(), []
        for _ in range(3):
            started = time.perf_counter()
            for _ in range(_GPU_LAUNCHES):
                self._gpu_side.add_parts(inputs, parts)
            done.record()
            done.synchronize()
            samples.append((time.perf_counter() - started) / _GPU_LAUNCHES)
        self._ring.done(parts)
        return float(median(samples[1:]) / share)
