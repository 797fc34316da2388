"""Both threads of a decode step with missing experts, without a GPU: stand-in graphs choose experts at random."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from fiddler.cost_curve import Curve
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.gpu.graphs import piece_sizes
from fiddler.kernels.one_token import Signal
from fiddler.offload.evictions import Evictions
from fiddler.offload.plan import Costs
from fiddler.telemetry.expert_counts import ExpertCounts
from fiddler.telemetry.recorder import SILENT
from oracles.both_sides import EXACT, LAYERS, E, F, orchestrator, weights_of
from oracles.token_graphs import RandomGraphs, check_step, likely_after

MS = 1e-3
COSTS = Costs(Curve((1,), (2 * MS,)), Curve((1,), (0.0,)), 4 * MS, 0.0)  # such that one step of the balance moves rows
STREAM = Costs(Curve((1,), (1e9,)), Curve((1,), (0.0,)), 4 * MS, 0.0)
K = 2
TABLE = np.zeros(1, np.int64)


@pytest.fixture(params=["pieces", "single", "one"], autouse=True)
def pieces(request, monkeypatch):
    """How many layers the graphs have."""
    if request.param != "pieces":
        sizes = {"single": lambda layers: [1] * layers, "one": lambda layers: [layers]}[request.param]
        monkeypatch.setattr(RandomGraphs, "divided", staticmethod(sizes))


def decode(late=0.0, recorder=SILENT, placed=((0,), (), ()), rows=256, costs=COSTS):
    experts = orchestrator(EXACT, placed, costs, rows=rows)
    graphs = RandomGraphs(experts, K, late)
    return DecodeGraphs(graphs, experts, recorder), graphs, experts


@pytest.mark.parametrize("late", [0.0, 3 * MS])
def test_rows_of_the_cpu_and_streamed_rows_are_all_rows_of_the_missing_experts(late):
    """Also where the GPU is late."""
    decoder, graphs, experts = decode(late)
    assert len(graphs.jobs) == 1
    streamed = 0
    for token in range(30):
        decoder.step(token, token, TABLE)
        streamed += check_step(graphs, experts)
    assert streamed > 0
    assert all((delay > 0) >= (late > 0) for balance in experts.balances for delay in balance.delays(K)[1:])
    assert graphs.sent_there


def test_the_delay_of_the_gpu_is_that_of_each_layer(monkeypatch):
    decoder, graphs, experts = decode()
    monkeypatch.setattr(graphs, "streamed", lambda index: index != 1)
    for token in range(30):
        decoder.step(token, token, TABLE)
        check_step(graphs, experts)
    assert [balance.delays(K)[2] > 0 for balance in experts.balances] == [False, True, False]
    assert experts.balances[1].delays(K)[1] > 0 > experts.balances[0].delays(K)[1]


def test_the_caller_sends_what_the_worker_thread_is_too_busy_for():
    """The worker thread still queues graphs when the first layer is divided. Copies are several chunks."""
    decoder, graphs, experts = decode(rows=64)
    graphs.slow = 2 * MS
    for token in range(10):
        decoder.step(token, token, TABLE)
        check_step(graphs, experts)
    assert graphs.sent_here
    assert graphs.sent_there


@pytest.mark.parametrize("rows", [F, 2 * F, 3 * F])
def test_all_missing_experts_are_streamed_in_as_many_chunks_as_the_ring_needs(rows):
    layers = weights_of("bf16", "f32", 1, 12, 64, 32)
    experts = orchestrator(layers, [[0, 1], [], [3]], STREAM, rows=64 * rows // F // 3 * 3)
    graphs = RandomGraphs(experts, 6)
    assert len(graphs.jobs) == -(-6 // (experts.ring.token_rows // 64))
    decoder = DecodeGraphs(graphs, experts, SILENT)
    for token in range(10):
        decoder.step(token, token, TABLE)
        missing = sum((layer, e) not in experts.residents for layer, i in enumerate(graphs.inputs) for e in i[1][0])
        assert check_step(graphs, experts) == 64 * missing


def test_a_plan_is_made_once_for_each_layer_although_the_balance_changes(monkeypatch):
    """A second plan, made after the balance has changed, could leave rows to nobody."""
    decoder, _, experts = decode()
    planned, compute_token = [], experts.compute_token

    def counted(layer, *arguments):
        if (plan := compute_token(layer, *arguments)) is not None:
            planned.append((layer, threading.get_ident()))
        return plan

    monkeypatch.setattr(experts, "compute_token", counted)
    decoder.step(1, 1, TABLE)
    assert planned == [(layer, threading.get_ident()) for layer in range(LAYERS)]


@pytest.mark.parametrize("late", [0.0, 3 * MS])
def test_any_mixture_of_right_and_wrong_guesses_computes_each_step_for_its_own_token(late):
    """With other sequences between, counts that are read, and callers that draw; the balance changes meanwhile."""
    recorder = ExpertCounts(LAYERS, E)
    recorder.wants_expert_ids = False
    decoder, graphs, experts = decode(late, recorder)
    numbers, taken, wrong, tokens = random.Random(0), 0, 0, [[1], [2]]
    for _ in range(120):
        recorder.wants_expert_ids = numbers.random() < 0.05
        sequence = tokens[numbers.random() < 0.1]
        if numbers.random() < 0.1:
            decoder.forget_ahead()
        begun, token, position = graphs.begun_ahead, sequence[-1], len(sequence) - 1
        decoder.step(token, position, TABLE + (sequence is tokens[1]), greedy=numbers.random() < 0.95)
        graphs.synchronize()
        last = graphs.history[-2 if graphs.begun_ahead else -1]
        assert last == (token, position)
        taken += begun and graphs.history.count(last) == 1
        check_step(graphs, experts)
        likely = likely_after(token)
        if numbers.random() < 0.95:  # else the GPU's choice stays unknown
            decoder.logits()
            assert decoder.largest in ((None, likely) if not graphs.begun_ahead else (likely,))
        sequence.append(likely if numbers.random() < 0.9 else likely + 1)
        wrong += sequence[-1] != likely
    assert taken > 20
    assert wrong > 5


def test_graphs_of_one_layer_then_of_four():
    sizes = {0: [], 1: [1], 2: [1, 1], 3: [1, 1, 1], 6: [1, 1, 4], 7: [1, 1, 4, 1], 12: [1, 1, 4, 4, 2]}
    assert {layers: piece_sizes(layers) for layers in sizes} == sizes


@pytest.mark.parametrize("rows", [64, 256])
def test_layers_of_graphs_of_several_layers_are_whole(rows):
    experts = orchestrator(EXACT * 3, [[layer % E] for layer in range(9)], COSTS, rows=rows)
    graphs = RandomGraphs(experts, K)
    decoder, streamed = DecodeGraphs(graphs, experts, SILENT), 0
    for token in range(20):
        decoder.step(token, token, TABLE, greedy=True)
        streamed += check_step(graphs, experts)
    assert streamed > 0


def chosen_in_steps(decoder, graphs, steps):
    """Run steps of one token; returns how often each expert was chosen, int64 [L, E]."""
    counts = np.zeros((LAYERS, E), np.int64)
    for token in range(steps):
        decoder.step(token, token, TABLE)
        graphs.synchronize()
        decoder.without_logits()
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
    compute_token = experts.compute_token

    def fails(*arguments):
        raise ValueError("broken off")

    for token in range(20):
        if side == "CPU":
            monkeypatch.setattr(experts, "compute_token", fails)
        else:
            graphs.fails = True
        with pytest.raises(ValueError, match="broken off"):
            decoder.step(token, token, TABLE)
        assert not experts.cooperative_step.running
        monkeypatch.setattr(experts, "compute_token", compute_token)
        graphs.fails = False
        decoder.step(token, token, TABLE)
        check_step(graphs, experts)
    # the next step of several tokens waits for no sum that nobody computes
    step = experts.cooperative_step
    assert step.run(lambda: step.rest() or 7, lambda part: None) == 7


def test_numbers_of_signals_may_overflow():
    decoder, graphs, experts = decode()
    signals = graphs.signals
    signals._next = 2**32 - 20
    for signal in Signal:
        signals.set(signal, signals._next - 1)
    for signal in (Signal.SENT, Signal.COMPUTED):
        signals.set(signal, signals.chunk(signals._next, 0) - 1)
    for token in range(20):
        decoder.step(token, token, TABLE)
        check_step(graphs, experts)
    assert signals.first > 2**32


def steps(decoder, token, count=24):
    """Every other step begins the next one ahead, once the pause after a wrong guess is over."""
    for position in range(count):
        decoder.step(token, position, TABLE, greedy=position % 2 == 0)
        decoder.logits()
        token = likely_after(token)


@pytest.mark.parametrize("rows", [64, 256], ids=["in chunks", "in one chunk"])
@pytest.mark.parametrize("costs", [COSTS, STREAM], ids=["both sides", "streamed"])
def test_a_step_broken_off_at_any_call_leaves_nothing_that_waits(monkeypatch, costs, rows):
    """By the caller, as by Ctrl-C, or on the worker thread."""
    decoder, graphs, experts = decode(rows=rows, costs=costs)
    assert (len(graphs.jobs) > 1) == (rows < 256)
    numbers = random.Random(0)
    for token in range(100):
        left = numbers.randrange(LAYERS + 1)

        def breaks(call, *arguments, **named):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return call(*arguments, **named)

        calls = [(experts, "compute_token")] * 2  # of which there are more than of the others
        calls += [(graphs, name) for name in ("begin", "launch", "begin_ahead", "queue", "send", "send_when_divided")]
        calls += [(graphs, name) for name in ("reserve", "streamed", "end")]
        target, name = numbers.choice(calls)
        rare = name in ("send", "streamed")  # need a busy worker thread; a part of each side
        call = getattr(target, name)
        monkeypatch.setattr(target, name, partial(breaks, call))
        with suppress(KeyboardInterrupt) if rare else pytest.raises(KeyboardInterrupt):
            steps(decoder, token)
        monkeypatch.setattr(target, name, call)
        graphs.synchronize()
        decoder.step(token, token, TABLE)
        check_step(graphs, experts)
