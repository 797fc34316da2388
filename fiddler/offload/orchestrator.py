"""Computes a layer's experts on both sides at once: residents on the GPU; missing ones on the CPU, streamed, or split.

Knows where weights lie, and divides the work as `plan` says; not the model's structure, nor how costs were measured.
All-CPU, all-GPU and every plan between give the same sums within rounding: that is its whole specification, and with
a `HostCopy` both sides are the CPU.

A step has two threads. The caller's runs all CPU kernels, which release Python's lock. Meanwhile the worker thread
runs the model and queues the GPU's copies and products. A semaphore orders the GPU's queue: layer n + 1's attention is
launched before the CPU has finished layer n, and waits for its sum. (One token: see `decode_graphs`.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.offload.expert_biases import ExpertBiases
from fiddler.offload.expert_cache import Residents
from fiddler.offload.feed_forward import tokens_by_expert
from fiddler.offload.gpu_side import GpuSide, Grouped
from fiddler.offload.one_token import OneToken, TokenInputs, TokenPlan
from fiddler.offload.plan import Balance, Costs, Plan, plan_with_sums
from fiddler.offload.prefetch import Prefetcher
from fiddler.offload.staging_ring import Part, Ring
from fiddler.offload.token_signals import TokenSignals
from fiddler.offload.worker_thread import CooperativeStep, WorkerThread
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["CpuPart", "Orchestrator", "Split"]

_STEP = 64  # hidden rows by which experts are split, if blocks of down are no longer: whole tiles on both sides


class Split(NamedTuple):
    """Division of a layer's missing experts: the GPU has the last of their hidden rows, the CPU the others."""

    gpu_rows: dict[int, int]  # of each missing expert with tokens
    cpu_rows: np.ndarray  # int64 [E], 0 for residents and experts without tokens
    seconds: float  # expected
    lead: float  # by which the GPU is expected to end before the CPU [s], where both have a part


class CpuPart(NamedTuple):
    """A layer as the worker thread planned it, on its way to the caller's thread, which computes the CPU's part."""

    layer: int
    x: np.ndarray  # float32 [T, D]
    expert_ids: np.ndarray  # int64 [T, K]
    routing_weights: np.ndarray  # float32 [T, K]
    cpu_rows: np.ndarray  # int64 [E], see `Split`
    rows: int  # their sum


class Orchestrator:
    """The model's experts where some are resident on the GPU and some are not: `layer` is its `Experts`."""

    def __init__(
        self,
        layers: Sequence[ExpertWeights],
        residents: Residents,
        ring: Ring,
        costs: Costs,
        max_tokens: int,
        workspace_bytes: int,
        recorder: Recorder = SILENT,
        grouped: Grouped | None = None,
    ) -> None:
        """max_tokens: of one step. workspace_bytes: for the GPU's temporaries, see `feed_forward`.

        grouped: computes several experts on the GPU at once; without it torch computes them one by one.
        """
        self.layers, self.residents, self.ring = layers, residents, ring
        self._recorder, self._max_tokens = recorder, max_tokens
        experts, self._hidden, width = layers[0].shape
        self._experts = experts
        self._row_bytes = [w.hidden_row_bytes for w in layers]
        self.biases = ExpertBiases.of(layers, ring.weight_copy.device)
        self._on_cpu = [w.ffn(down_bias=False) for w in layers]  # the GPU adds those of down
        self._complete = [residents.complete(layer) for layer in range(len(layers))]
        self._pinned = ring.weight_copy.device.type == "cuda"
        self._x, self._y = self._host(max_tokens, width), self._host(max_tokens, width)
        self._expert_ids = self._host(max_tokens, 1, dtype=torch.int64)
        self._routing_weights = self._host(max_tokens, 1)
        self._host_copied = ring.weight_copy.event()
        self._gpu_side = GpuSide(residents, ring, workspace_bytes, recorder, grouped, self.biases)
        self.prefetcher = Prefetcher(layers, residents, ring, recorder)
        self.semaphore = ring.weight_copy.semaphore()
        setup = partial(torch.cuda.set_device, ring.weight_copy.device) if self._pinned else lambda: None
        self.cooperative_step: CooperativeStep[CpuPart] = CooperativeStep(
            WorkerThread("fiddler-gpu", setup), self.semaphore
        )
        self._token: OneToken | None = None
        self._signals = TokenSignals(pinned=False)
        self.planned_seconds = 0.0  # expected, of all layers of several tokens so far
        self.plan_by(costs)

    def plan_by(self, costs: Costs) -> None:
        """Plan with these costs of an expert of the first layer from now on; others' follow from their bytes."""
        self._costs = costs
        first, step = self.layers[0].expert_bytes, max(_STEP, *(w.split_rows for w in self.layers))
        sum_bytes, sizes = 4 * self.layers[0].shape[2], {w.expert_bytes for w in self.layers}
        # not bound to self: counting references would never free that cycle
        plans = {n: partial(plan_with_sums, costs.scaled(n / first), self._hidden, step, sum_bytes / n) for n in sizes}
        again = {n: lru_cache(maxsize=4096)(plan) for n, plan in plans.items()}
        self._plan = [plans[w.expert_bytes] for w in self.layers]
        self._plan_again = [again[w.expert_bytes] for w in self.layers]  # of evenly spread tokens: these come back
        self.balances = [Balance() for _ in self.layers]
        self._plan_token()

    def _plan_token(self) -> None:
        if self._token is not None:
            self._token.plan_by(self._plan_again, self.balances, blocks=self.ring.weight_copy.blocks)

    def _host(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A host tensor, pinned where the copies go to a GPU."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self._pinned)

    def step(self, forward: Callable[[], Tensor], last_layer_tokens: int) -> Tensor:
        """Begin a step: run `forward` on the worker thread, and the CPU's parts of it here; return its result.

        `forward` calls `layer` for each layer. last_layer_tokens: tokens that the last layer will have.
        """
        self.start_over()
        self._signals.ended = False
        self.prefetcher.begin_step(last_layer_tokens)

        def run() -> Tensor:
            with torch.inference_mode():
                return forward()

        return self.cooperative_step.run(run, self._compute)

    def start_over(self) -> None:
        """End a step that was broken off, and drop the weights that were sent for it."""
        if (signals := self._signals).ended:
            return
        signals.stop()
        self.cooperative_step.stop()
        if signals.running:
            sent = self.ring.weight_copy.event()
            self.ring.weight_copy.arrive(sent)
            sent.synchronize()  # each copy that is under way sets a signal
            signals.release()
        self.prefetcher.begin_step(self._max_tokens)
        self.ring.release()

    def layer(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """Implements `Experts` within a step: x [T, D], expert_ids and routing_weights [T, K] -> [T, D], on the GPU."""
        assert self.cooperative_step.running, "a layer is computed within a step"
        self._recorder.chosen(layer, expert_ids)
        pieces = zip(*(tensor.split(self._max_tokens) for tensor in (x, expert_ids, routing_weights)), strict=True)
        outputs = [self._piece(layer, *piece) for piece in pieces]  # several only where sequences are long
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _piece(self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor) -> Tensor:
        """`layer` of at most `max_tokens` tokens."""
        tokens, y = len(x), torch.zeros_like(x)
        if tokens == 0:
            return y
        host_inputs = self._to_host(layer, x, expert_ids, routing_weights)
        if self.cooperative_step.stopping:
            raise RuntimeError("the step was broken off")  # nobody sees it: the caller has left
        counts, first = tokens_by_expert(host_inputs[1], self._experts)
        self.prefetcher.count(layer, counts)
        prefetched = self.prefetcher.take(layer)
        split = self.split(layer, counts, prefetched, self._copy_seconds_left(prefetched), tokens)
        self.planned_seconds += split.seconds
        number = None
        if split.cpu_rows.any():
            rows = int(split.cpu_rows.sum())
            number = self.cooperative_step.leave(CpuPart(layer, *host_inputs, split.cpu_rows, rows))
        with self._recorder.span("queue", 0):
            self._gpu_side.add_experts(
                *(self.layers[layer], layer, x, expert_ids, routing_weights, first, split.gpu_rows, prefetched, y)
            )
            plan_next = self._plan_again[min(layer + 1, len(self.layers) - 1)]
            self.prefetcher.start(layer + 1, tokens, expert_ids.shape[1], plan_next)
        if number is not None:
            self.semaphore.wait(number)
            self._gpu_side.add_host_sums(y, self._y[:tokens])
        return y

    def _to_host(
        self, layer: int, x: Tensor, expert_ids: Tensor, routing_weights: Tensor
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Copy the CPU's inputs to the host, with one wait: x (where it may compute), expert_ids, routing_weights."""
        tokens, k = expert_ids.shape
        if self._expert_ids.shape[1] != k:
            self._expert_ids = self._host(self._max_tokens, k, dtype=torch.int64)
            self._routing_weights = self._host(self._max_tokens, k)
        copies = [(self._expert_ids, expert_ids), (self._routing_weights, routing_weights)]
        if not self._complete[layer]:
            copies.append((self._x, x))
        for target, source in copies:
            target[:tokens].copy_(source, non_blocking=True)
        self._host_copied.record()
        self.cooperative_step.rest()  # sleeps first: waiting for the GPU below keeps a core busy
        with self._recorder.span("wait", 0):
            self._host_copied.synchronize()
        return self._x[:tokens].numpy(), self._expert_ids[:tokens].numpy(), self._routing_weights[:tokens].numpy()

    def complete(self, layer: int) -> bool:
        """Whether all experts of a layer are resident: no work for the CPU, and no copies."""
        return self._complete[layer]

    @property
    def incomplete(self) -> list[int]:
        """The layers some of whose experts are missing."""
        return [layer for layer, complete in enumerate(self._complete) if not complete]

    def split(
        self,
        layer: int,
        counts: np.ndarray,
        prefetched: Sequence[Sequence[Part]] = (),
        gpu_delay: float = 0.0,
        tokens: int = 1,
    ) -> Split:
        """Divide a layer whose experts have `counts` [E] tokens.

        prefetched: parts on the GPU or on their way, of one slot of the ring after the other.
        gpu_delay: of the GPU's begin after the CPU's [s]. tokens: of the layer; the CPU sends their sums.
        """
        missing = [e for e in np.flatnonzero(counts).tolist() if (layer, e) not in self.residents]
        prefetched_rows = dict.fromkeys(missing, 0)
        for parts in prefetched:
            for part in parts:
                if part.expert in prefetched_rows:
                    prefetched_rows[part.expert] += part.end - part.begin
        plan = self._plan[layer](tuple(counts[missing].tolist()), tuple(prefetched_rows.values()), gpu_delay, tokens)
        return self._as_split(missing, plan)

    def bind_token(self, inputs: TokenInputs, signals: TokenSignals) -> OneToken:
        """Prepare `compute_token` for tokens with these arrays."""
        counts, self._signals = self.prefetcher.counts, signals
        self._token = token = OneToken(inputs, self._on_cpu, self.residents, self._hidden, counts, signals.numbers)
        self._plan_token()
        return token

    def compute_token(self, layer: int, number: int, send: Callable[[int, int, TokenPlan], None]) -> TokenPlan | None:
        """Divide a layer of the token whose arrays are bound, and compute the CPU's part. See `OneToken.compute`."""
        assert self._token is not None
        begun = time.perf_counter()
        plan = self._token.compute(layer, number, send)
        divided, ended = self._token.times(layer)
        self._recorder.did("wait", begun, divided, 0)
        if plan is not None and plan.cpu_rows:
            self._recorder.did("experts", divided, ended, plan.cpu_rows * self._row_bytes[layer])
        return plan

    def step_seconds(self, tokens: int, k: int) -> float:
        """Expected seconds of the experts of all layers in a step whose tokens choose `k` experts each, evenly.

        What the dense part takes comes on top.
        """
        used = max(k, round(self._experts * (1 - (1 - k / self._experts) ** tokens)))
        counts, total = np.zeros(self._experts, np.int64), 0.0
        counts[np.linspace(0, self._experts - 1, used).round().astype(np.int64)] = max(1, round(tokens * k / used))
        for layer in range(len(self.layers)):
            here = [e for e in np.flatnonzero(counts).tolist() if (layer, e) in self.residents]
            residents = sum([self._costs.gpu(int(counts[e])) for e in here])
            total += max(residents, self.split(layer, counts, tokens=tokens).seconds)
        return total

    def _as_split(self, missing: Sequence[int], plan: Plan) -> Split:
        gpu_rows, cpu_rows = dict(zip(missing, plan.gpu_rows, strict=True)), np.zeros(self._experts, np.int64)
        for e, rows in gpu_rows.items():
            cpu_rows[e] = self._hidden - rows
        return Split(gpu_rows, cpu_rows, plan.seconds, plan.lead)

    def _copy_seconds_left(self, prefetched: Sequence[Sequence[Part]]) -> float:
        """Seconds until these parts are copied; of the first slot under way, half is left."""
        under_way = [parts for parts in prefetched if not parts[0].arrived.query()]
        rows = [sum(part.end - part.begin for part in parts) for parts in under_way]
        return (sum(rows) - rows[0] / 2) / self._hidden * self._costs.copy if rows else 0.0

    def _compute(self, part: CpuPart) -> None:
        """Compute the CPU's part of a layer into the step's sums."""
        with self._recorder.span("experts", part.rows * self._row_bytes[part.layer]):
            inputs = part.x, part.expert_ids, part.routing_weights, part.cpu_rows
            self._on_cpu[part.layer](*inputs, self._y[: len(part.x)].numpy())
