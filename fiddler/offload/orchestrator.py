"""A layer's experts on both sides at once: residents on the GPU, missing ones on the CPU, over the link, or split.

Knows who has which weights and asks `plan` who does what; not the model's structure, nor how costs were measured.
All-CPU, all-GPU and every plan between give the same sums within rounding: that is its whole specification, and with
a `HostCopy` both sides are the CPU.

Two threads: the caller's is in the CPU's kernels, which are always called from there and leave Python's lock free; the
side thread runs the model meanwhile, and queues the GPU's copies and products. The GPU waits for the CPU's sum of a
layer at a gate; behind it the next layer's dense half is queued already. (One token: see `decode_graphs`.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache, partial
from math import inf
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fiddler import kernels
from fiddler.files.weights import ExpertWeights
from fiddler.offload.expert_cache import Residents
from fiddler.offload.feed_forward import Job, feed_forward, tokens_by_expert, torch_type
from fiddler.offload.plan import Balance, Costs, Plan, make_plan
from fiddler.offload.staging_ring import Part, Ring
from fiddler.offload.worker_thread import CooperativeStep, WorkerThread
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["Grouped", "Orchestrator", "Split"]

_STEP = 64  # hidden rows by which experts are split: whole vectors and tiles on both sides
_MARGIN = 0.05  # of the time; what a plan saves by less is lost to what it does not know
_SURELY = 8  # tokens that an expert of the next layer must be expected to have to be sent ahead


class Grouped(Protocol):
    """What `grouped_kernels` has for several tokens, see there."""

    def experts_of_many(
        self, x: Tensor, token: Tensor, routing_weights: Tensor, jobs: Sequence[Job], most: int, into: Tensor, work: int
    ) -> None:
        """Several experts at once, in 16 bits."""
        ...

    def add_from_host(self, into: Tensor, given: Tensor) -> None:
        """Add what the CPU computed."""
        ...


class Split(NamedTuple):
    """What a layer's missing experts become: the GPU has the last of their hidden rows, the CPU the others."""

    gpu_rows: dict[int, int]  # of each missing expert with tokens
    cpu_rows: np.ndarray  # int64 [E], 0 for residents and experts without tokens
    seconds: float  # that it should take


class _CpuPart(NamedTuple):
    """What the CPU is to compute of a layer."""

    layer: int
    x: np.ndarray
    expert_ids: np.ndarray
    routing_weights: np.ndarray
    split: Split


class Orchestrator:
    """The model's `Experts` where some live on the GPU and some do not."""

    def __init__(
        self,
        layers: Sequence[ExpertWeights],
        residents: Residents,
        ring: Ring,
        costs: Costs,
        tokens: int,
        work: int,
        recorder: Recorder = SILENT,
        grouped: Grouped | None = None,
    ) -> None:
        """tokens: the most of one step. work: bytes for the GPU's temporaries, see `feed_forward`.

        grouped: computes several experts on the GPU at once; without it they go through torch, one by one.
        """
        self.layers = layers
        self.residents = residents
        self.ring = ring
        self._work = work
        self._recorder = recorder
        self._tokens, self._grouped = tokens, grouped
        experts, self._hidden, width = layers[0].gate.shape
        self._complete = [residents.complete(layer) for layer in range(len(layers))]
        self._pinned = ring.weight_copy.device.type == "cuda"
        self._x, self._y = self._host(tokens, width), self._host(tokens, width)
        self._expert_ids, self._routing_weights = self._host(tokens, 1, dtype=torch.int64), self._host(tokens, 1)
        self._read = ring.weight_copy.event()
        self._ahead: tuple[int, list[Part]] = (0, [])
        self._last = tokens  # of the last layer, in this step
        self._seen = np.zeros((len(layers), experts), np.int64)
        self.semaphore = ring.weight_copy.semaphore()
        there = partial(torch.cuda.set_device, ring.weight_copy.device) if self._pinned else lambda: None
        self._between = ExitStack()  # layers' experts: the model's dense half, for the recorder
        self.shared: CooperativeStep[_CpuPart] = CooperativeStep(WorkerThread("fiddler-gpu", there), self.semaphore)
        self.planned_seconds = 0.0  # of all layers of several tokens so far, if the plans came true
        self.follow(costs)

    def follow(self, costs: Costs) -> None:
        """Plan by these costs from now on."""
        self._costs = costs
        # without self, which would then never be freed by counting references
        self._plan = lru_cache(maxsize=4096)(partial(_plan, costs, self._hidden))
        self.balance = Balance()  # of single tokens

    def _host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that both sides reach."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def beside(self, forward: Callable[[], Tensor], last: int) -> Tensor:
        """What `forward` returns, the model's step: it runs on the side thread, and what it leaves to the CPU here.

        last: tokens that the last layer will have.
        """
        self.start_over()
        self._last = last

        def step() -> Tensor:
            with torch.inference_mode(), self._between:
                self._between.enter_context(self._recorder.queued("dense"))
                return forward()

        def do(part: _CpuPart) -> None:
            self.on_cpu(*part, self._y[: len(part.x)].numpy())

        return self.shared.run(step, do)

    def start_over(self) -> None:
        """Forget a step that was broken off: what was sent for it is nobody's."""
        self.shared.stop()
        self._ahead = (0, [])
        self.ring.release()

    def __call__(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """The model's `Experts`: x [T, D], expert_ids and routing_weights [T, K], all on the GPU -> [T, D] there."""
        if not self.shared.running:
            return self.beside(lambda: self(layer, x, expert_ids, routing_weights), len(x))
        tokens, experts = len(x), len(self.layers[layer].gate)
        if tokens > self._tokens:  # several long sequences
            parts = zip(*(tensor.split(self._tokens) for tensor in (x, expert_ids, routing_weights)), strict=True)
            return torch.cat([self(layer, *part) for part in parts])
        y = torch.zeros_like(x)
        if tokens == 0:
            return y
        given = self._to_host(layer, x, expert_ids, routing_weights)
        if self.shared.stopping:
            raise RuntimeError("the step was broken off")  # to nobody: its caller has left
        counts, first = tokens_by_expert(given[1], experts)
        self._seen[layer] += counts
        (sent_for, ahead), self._ahead = self._ahead, (0, [])
        if sent_for != layer:
            for part in ahead:
                self.ring.done(part)
            ahead = []
        split = self.split(layer, counts, ahead, self._until_arrived(ahead), tokens)
        self.planned_seconds += split.seconds
        number = None
        if split.cpu_rows.any():
            number = self.shared.leave(_CpuPart(layer, *given, split))
        with self._recorder.span("queue", 0):
            self._on_gpu(layer, x, expert_ids, routing_weights, first, split, ahead, y)
        if number is not None:
            self.semaphore.wait(number)
            if self._grouped is not None:
                self._grouped.add_from_host(y, self._y[:tokens])
            else:
                y += self._y[:tokens].to(y.device, non_blocking=True)
        self._between.enter_context(self._recorder.queued("dense"))
        return y

    def _to_host(
        self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the CPU needs to know, after one wait: x (where it may compute), ids and weights."""
        tokens, k = expert_ids.shape
        if self._expert_ids.shape[1] != k:
            self._expert_ids, self._routing_weights = (
                self._host(self._tokens, k, dtype=torch.int64),
                self._host(self._tokens, k),
            )
        given = [(self._expert_ids, expert_ids), (self._routing_weights, routing_weights)]
        if not self._complete[layer]:
            given.append((self._x, x))
        for target, source in given:
            target[:tokens].copy_(source, non_blocking=True)
        self._between.close()
        self._read.record()
        self.shared.rest()  # rather than where a thread waits for the GPU, busily
        with self._recorder.span("wait", 0):
            self._read.synchronize()
        return self._x[:tokens].numpy(), self._expert_ids[:tokens].numpy(), self._routing_weights[:tokens].numpy()

    def complete(self, layer: int) -> bool:
        """Whether all experts of a layer are residents, so that nothing is left for the CPU or the link."""
        return self._complete[layer]

    def split(
        self, layer: int, counts: np.ndarray, ahead: Sequence[Part] = (), later: float = 0.0, tokens: int = 1
    ) -> Split:
        """Who does what of a layer in which the experts have so many tokens, `ahead` being on its way already.

        later: seconds by which the GPU begins after the CPU. tokens: in all, whose sums the CPU hands over.
        """
        missing = [e for e in np.flatnonzero(counts).tolist() if (layer, e) not in self.residents]
        here = dict.fromkeys(missing, 0)
        for part in ahead:
            if part.expert in here:
                here[part.expert] += part.end - part.begin
        plan = self._plan(tuple(counts[missing].tolist()), tuple(here.values()), later, tokens)
        cpu_rows = np.zeros(len(counts), np.int64)
        for e, rows in zip(missing, plan.gpu_rows, strict=True):
            cpu_rows[e] = self._hidden - rows
        return Split(dict(zip(missing, plan.gpu_rows, strict=True)), cpu_rows, plan.seconds)

    def _until_arrived(self, ahead: Sequence[Part]) -> float:
        """Seconds for which the link still has these to carry, about half of the first having passed."""
        rows = [part.end - part.begin for part in ahead if not part.arrived.query()]
        return (sum(rows) - rows[0] / 2) / self._hidden * self._costs.copy if rows else 0.0

    def split_one(self, layer: int, chosen: Sequence[int]) -> Split:
        """`split` for one token with these experts, each once: in microseconds.

        A link that blocks has no part in it: it would begin when the CPU is done.
        """
        missing = [e for e in chosen if (layer, e) not in self.residents]
        cpu_rows = np.zeros(self._seen.shape[1], np.int64)
        if self.ring.weight_copy.blocks:
            cpu_rows[missing] = self._hidden
            return Split(dict.fromkeys(missing, 0), cpu_rows, 0.0)
        plan = self._plan((1,) * len(missing), (0,) * len(missing), self.balance.seconds, 1)
        for e, rows in zip(missing, plan.gpu_rows, strict=True):
            cpu_rows[e] = self._hidden - rows
        return Split(dict(zip(missing, plan.gpu_rows, strict=True)), cpu_rows, plan.seconds)

    def on_cpu(
        self,
        layer: int,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
        split: Split,
        out: np.ndarray,
    ) -> bool:
        """The CPU's part of a layer, into `out` [T, D]; False where it has none."""
        rows = int(split.cpu_rows.sum())
        if rows == 0:
            return False
        w = self.layers[layer]
        with self._recorder.span("experts", rows * 6 * w.gate.shape[2]):
            kernels.expert_ffn(x, expert_ids, routing_weights, w.gate, w.up, w.down, w.variant, split.cpu_rows, out)
        return True

    def _on_gpu(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        routing_weights: Tensor,
        first: np.ndarray,
        split: Split,
        ahead: Sequence[Part],
        y: Tensor,
    ) -> None:
        """Queue the GPU's part of a layer, residents first: y [T, D] += it. Then send ahead for the next one."""
        w = self.layers[layer]
        rounded, hidden = w.variant.activations == "bf16", self._hidden
        order = torch.argsort(expert_ids.reshape(-1), stable=True)
        token, sorted_weights = order // expert_ids.shape[1], routing_weights.reshape(-1)[order]
        given = x.to(torch_type(w)) if rounded else x
        together = rounded and self._grouped is not None

        def add(e: int, matrices: tuple[Tensor, Tensor, Tensor]) -> None:
            """Expert by expert."""
            rows = token[first[e] : first[e + 1]]
            with self._recorder.queued("experts"):
                made = feed_forward(given[rows], *matrices, rounded=rounded, work=self._work)
                y.index_add_(0, rows, made.mul_(sorted_weights[first[e] : first[e + 1], None]))

        def add_together(jobs: Sequence[Job], most: int) -> None:
            """In 16 bits."""
            assert self._grouped is not None
            with self._recorder.queued("experts"):
                self._grouped.experts_of_many(given, token, sorted_weights, jobs, most, y, self._work)

        def use(part: Part) -> None:
            part.arrived.wait()
            if together:
                e, rows = part.expert, part.end - part.begin
                add_together([Job(part.addresses, rows, int(first[e]), int(first[e + 1]))], rows)
            else:
                add(part.expert, part.matrices(torch_type(w)))
            self.ring.done(part)

        here = [e for e in range(len(first) - 1) if first[e + 1] > first[e] and (layer, e) in self.residents]
        if not together:
            for e in here:
                add(e, self.residents[layer, e])
        elif here:
            found = [(e, self.residents.addresses(layer, e)) for e in here]
            add_together([Job(addresses, hidden, int(first[e]), int(first[e + 1])) for e, addresses in found], hidden)
        for part in ahead:
            if part.expert in split.gpu_rows:
                use(part)
            else:
                self.ring.done(part)
        sent = {e: sum(part.end - part.begin for part in ahead if part.expert == e) for e in split.gpu_rows}
        nbytes = sum(rows - sent[e] for e, rows in split.gpu_rows.items()) * 6 * x.shape[1]
        with self._recorder.span("link", nbytes):
            for e, rows in split.gpu_rows.items():
                for part in self.ring.send(layer, e, hidden - rows, hidden - sent[e]):
                    use(part)
        self._send_ahead(layer + 1, *expert_ids.shape)

    def _send_ahead(self, layer: int, tokens: int, each: int) -> None:
        """Start sending an expert of the next layer that will be streamed, whatever its router says.

        That is the missing one that had the most tokens so far, if a plan with evenly spread tokens would stream all
        of some expert.
        """
        experts, layers = len(self.layers[0].gate), len(self.layers)
        if layer == layers - 1:
            tokens = min(tokens, self._last)
        if layer >= layers or self._complete[layer] or tokens * each < _SURELY * experts:
            return
        missing = [e for e in range(experts) if (layer, e) not in self.residents]
        plan = self._plan((max(1, tokens * each // experts),) * len(missing), (0,) * len(missing), 0.0, tokens)
        if self._hidden not in plan.gpu_rows:
            return
        e = max(missing, key=lambda e: int(self._seen[layer, e]))
        w, begin = self.layers[layer], max(0, self._hidden - self.ring.slots * self.ring.rows)
        with self._recorder.span("link", (self._hidden - begin) * 6 * w.gate.shape[2]):
            self._ahead = (layer, list(self.ring.send(layer, e, begin, self._hidden)))


def _plan(
    costs: Costs, hidden: int, tokens: tuple[int, ...], ahead: tuple[int, ...], later: float, handed_over: int
) -> Plan:
    """handed_over: tokens whose sums, 4 bytes an element, go over the link where the CPU has a part; a row has 6."""
    start = costs.cpu_start + (0.0 if costs.copy == inf else handed_over * 4 / (6 * hidden) * costs.copy)
    costs = replace(costs, cpu_start=start, copy_start=costs.copy_start + later)
    return make_plan(tokens, costs, hidden, _STEP, ahead, _MARGIN)
