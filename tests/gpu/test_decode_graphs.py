"""Both threads of a decode step with missing experts, without a GPU: stand-in graphs choose experts at random."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from fiddler.cost_curve import Curve
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.offload.evictions import Evictions
from fiddler.offload.plan import Costs
from fiddler.telemetry.expert_counts import ExpertCounts
from fiddler.telemetry.recorder import SILENT
from oracles import naive
from oracles.both_sides import EXACT, LAYERS, D, E, F, orchestrator

MS = 1e-3
COSTS = Costs(Curve((1,), (2 * MS,)), Curve((1,), (0.0,)), 4 * MS, 0.0)  # such that one step of the balance moves rows
K = 2
TABLE = np.zeros(1, np.int64)


class RandomGraphs:
    """Implements `Graphs`: what a graph hands to the host is drawn at random, and whole layers are computed at once.

    late: seconds by which the worker thread is late. sums: of each layer, what the next graph read.
    """

    def __init__(self, experts, late=0.0):
        self.breaks, self.hidden = list(range(LAYERS)), torch.zeros(1, D)
        self.x, self.cpu_sum = np.zeros((1, D), np.float32), np.full((1, D), np.nan, np.float32)
        self.expert_ids, self.routing_weights = np.zeros((1, K), np.float32), np.zeros((1, K), np.float32)
        self._experts, self._late, self._numbers = experts, late, np.random.default_rng(0)
        self._arrived = [threading.Event() for _ in range(LAYERS)]
        self.inputs, self.sums, self.gpu_rows, self.fails = [], [], [], False
        self._sent = None
        self._token = experts.bind_token(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)

    @property
    def chosen(self):
        return [torch.from_numpy(expert_ids) for _, expert_ids, _ in self.inputs]

    def begin(self, token, position, table):
        for event in self._arrived:
            event.clear()
        self.inputs, self.sums, self.gpu_rows = [], [], []
        self._sent = None
        self.queue(0)

    def queue(self, graph):
        if graph:  # the graph begins with the sum of both sides
            self.sums.append(self.cpu_sum.copy())
        if graph < LAYERS:
            self.x[:], self.expert_ids[:] = self._numbers.normal(size=D), self._numbers.permutation(E)[:K]
            self.routing_weights[:] = self._numbers.random(K)
            self.inputs.append((self.x.copy(), self.expert_ids.astype(np.int64), self.routing_weights.copy()))
            self.gpu_rows.append({})
            self._arrived[graph].set()

    def wait(self, graph):
        assert self._arrived[graph].wait(10)

    def send(self, layer, plan):
        assert self._sent is None  # the worker thread has queued what reads the layer before
        expert_ids, gpu_rows = self._token.expert_ids[0].tolist(), self._token.gpu_rows.tolist()
        assert expert_ids == self.inputs[layer][1][0].tolist()
        assert all(rows for _, rows in gpu_rows[: plan.parts])
        assert not any(rows for _, rows in gpu_rows[plan.parts :])
        self._sent = layer, {expert_ids[j]: rows for j, rows in gpu_rows[: plan.parts]}

    def stream(self):
        time.sleep(self._late)
        if self.fails:
            raise ValueError("broken off")
        layer, self.gpu_rows[layer] = self._sent
        self._sent = None

    def streamed(self, layer):
        return bool(self.gpu_rows[layer])

    def logits(self):
        return torch.zeros(1, 1)


def decode(late=0.0, recorder=SILENT, placed=((0,), (), ())):
    experts = orchestrator(EXACT, placed, COSTS)
    graphs = RandomGraphs(experts, late)
    return DecodeGraphs(graphs, experts, recorder), graphs, experts


def cpu_part(layer, x, expert_ids, routing_weights, gpu_rows, residents):
    """The CPU's sum by float64: missing experts without their last `gpu_rows` hidden rows."""
    w, total = EXACT[layer], np.zeros(D)
    for e, weight in zip(expert_ids[0], routing_weights[0], strict=True):
        if (layer, e) in residents:
            continue
        gate, up, down = (naive.from_bits(bits[e], "bf16").astype(np.float64) for bits in (w.gate, w.up, w.down))
        rows = F - gpu_rows.get(int(e), 0)
        g, u = gate[:rows] @ x[0], up[:rows] @ x[0]
        total += weight * (down[:, :rows] @ (g / (1 + np.exp(-g)) * u))
    return total


@pytest.mark.parametrize("late", [0.0, 3 * MS])
def test_rows_of_the_cpu_and_streamed_rows_are_all_rows_of_the_missing_experts(late):
    """Also where the worker thread is late. The next graph reads the CPU's sum of exactly the rows not streamed."""
    decoder, graphs, experts = decode(late)
    streamed = 0
    for token in range(30):
        decoder.step(token, token, TABLE)
        assert len(graphs.sums) == LAYERS
        for layer, inputs in enumerate(graphs.inputs):
            expected = cpu_part(layer, *inputs, graphs.gpu_rows[layer], experts.residents)
            np.testing.assert_allclose(experts_sum := graphs.sums[layer][0], expected, rtol=1e-3, atol=1e-3)
            assert np.isfinite(experts_sum).all()
            streamed += any(graphs.gpu_rows[layer].values())
    assert streamed > 0
    assert experts.balance.seconds != 0


def test_a_plan_is_made_once_for_each_layer_although_the_balance_changes(monkeypatch):
    """A second plan, made after the balance has changed, could leave rows to nobody."""
    decoder, _, experts = decode()
    planned, split_token = [], experts.split_token

    def counted(layer):
        planned.append((layer, threading.get_ident()))
        return split_token(layer)

    monkeypatch.setattr(experts, "split_token", counted)
    decoder.step(1, 1, TABLE)
    assert planned == [(layer, threading.get_ident()) for layer in range(LAYERS)]


def chosen_in_steps(decoder, graphs, steps):
    """Run steps of one token; returns how often each expert was chosen, int64 [L, E]."""
    counts = np.zeros((LAYERS, E), np.int64)
    for token in range(steps):
        decoder.step(token, token, TABLE)
        for layer, (_, expert_ids, _) in enumerate(graphs.inputs):
            counts[layer, expert_ids[0]] += 1
    return counts


def test_the_experts_chosen_in_each_layer_are_counted():
    counts = ExpertCounts(LAYERS, E)
    decoder, graphs, _ = decode(recorder=counts)
    expected = chosen_in_steps(decoder, graphs, 10)
    assert counts.counts == expected.tolist()


def test_the_resident_that_single_tokens_chose_least_often_is_evicted_first():
    """Also where nobody records the experts, and no step had several tokens."""
    placed = [[0, 1, 2, 3], [1, 2], [0, 4]]
    decoder, graphs, experts = decode(placed=placed)
    counts = chosen_in_steps(decoder, graphs, 40)
    assert experts.prefetcher.counts.tolist() == counts.tolist()
    rarest = min(counts[layer, e] for layer, ids in enumerate(placed) for e in ids)
    assert Evictions(experts).evict()
    ((layer, expert),) = (
        (layer, e) for layer, ids in enumerate(placed) for e in ids if (layer, e) not in experts.residents
    )
    assert counts[layer, expert] == rarest
    assert rarest < np.median(counts)  # else any resident would do


@pytest.mark.parametrize("side", ["CPU", "GPU"])
def test_an_error_on_either_side_is_raised_and_the_next_step_is_whole(monkeypatch, side):
    decoder, graphs, experts = decode()
    on_cpu = experts.on_cpu

    def fails(*arguments):
        raise ValueError("broken off")

    for token in range(20):
        if side == "CPU":
            monkeypatch.setattr(experts, "on_cpu", fails)
        else:
            graphs.fails = True
        with pytest.raises(ValueError, match="broken off"):
            decoder.step(token, token, TABLE)
        assert not experts.cooperative_step.running
        monkeypatch.setattr(experts, "on_cpu", on_cpu)
        graphs.fails = False
        decoder.step(token, token, TABLE)
        assert len(graphs.sums) == LAYERS
    # the next step of several tokens waits for no sum that nobody computes
    step = experts.cooperative_step
    assert step.run(lambda: step.rest() or 7, lambda part: None) == 7
