"""Models of many small experts, the CPU on both sides: whole path, slots of several experts, plans of whole experts."""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fiddler.cost_curve import Curve
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.offload.plan import Costs
from fiddler.offload.staging_ring import SLOTS, slot_rows
from fiddler.telemetry.recorder import SILENT, Meter
from oracles import naive
from oracles.both_sides import LAYERS, MAX_TOKENS, Token, compute_layer, orchestrator, weights_of
from oracles.token_graphs import RandomGraphs, check_step

E, F, D, K = 40, 128, 32, 8
EXACT = weights_of("bf16", "f32", 1, E, F, D)
US = 1e-6
# of experts of Qwen3-30B-A3B: 9.4 MB
CPU, GPU = Curve((1, 8, 64, 512), (75 * US, 100 * US, 250 * US, 1700 * US)), Curve((1, 512), (10 * US, 50 * US))
COSTS = {
    "rows": Costs(CPU, GPU, 180 * US, 53 * US),
    "sets": Costs(CPU, GPU, 180 * US, 53 * US, cpu_split=30 * US, copy_split=60 * US),
    "stream": Costs(Curve((1,), (1e9,)), GPU, 180 * US, 0.0),
    "cpu": Costs(Curve((1,), (1e-9,)), GPU, 180 * US, 0.0),
}


def inputs_of(rng, tokens):
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    expert_ids = np.array([rng.permutation(E)[:K] for _ in range(tokens)], np.int64).reshape(tokens, K)
    return x, expert_ids, rng.random((tokens, K)).astype(np.float32)


def check(output, layer, inputs):
    w = EXACT[layer]
    expected, tolerance = naive.expert_ffn(*inputs, w.gate, w.up, w.down, "bf16", rounded=False)
    assert (np.abs(output - expected) <= 2 * tolerance).all()


@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_every_plan_of_small_experts_matches_float64(costs, data):
    placed = [data.draw(st.lists(st.integers(0, E - 1), unique=True, max_size=E)) for _ in range(LAYERS)]
    rows = data.draw(st.sampled_from([64, F, 3 * F, 14 * F]))  # of a slot: half an expert to fourteen
    experts = orchestrator(EXACT, placed, COSTS[costs], rows=rows)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for tokens in data.draw(st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=2)):
        for layer in range(LAYERS):
            inputs = inputs_of(rng, tokens)
            check(compute_layer(experts, layer, *inputs), layer, inputs)


def test_experts_of_a_prompt_are_prefetched_until_the_ring_is_full():
    meter = Meter()
    experts = orchestrator(EXACT, [[], [], []], COSTS["stream"], rows=4 * F, recorder=meter)
    rng = np.random.default_rng(0)

    def forward():
        for layer in range(LAYERS):
            inputs = inputs_of(rng, 60)
            output = experts.layer(layer, *(torch.from_numpy(array) for array in inputs))
            check(output.numpy(), layer, inputs)
            if layer < LAYERS - 1:
                sent_for, slots = experts.prefetcher.sent
                assert sent_for == layer + 1
                assert [len(parts) for parts in slots] == [4] * SLOTS
        return output

    experts.step(forward, 60)
    assert meter.nbytes["copy"] == LAYERS * E * EXACT[0].expert_bytes  # each once, sent ahead or not


@pytest.mark.parametrize("costs", COSTS)
def test_one_token_s_experts_on_both_sides_match_float64(costs):
    """The GPU's part as a decode step streams it: all its experts together, each computed from where it arrived."""
    experts = orchestrator(EXACT, [[0, 1, 2, 3, 4, 5, 6], [], []], COSTS[costs], rows=14 * F)
    graphs = RandomGraphs(experts, K)
    decoder, table, splits = DecodeGraphs(graphs, experts, SILENT), np.zeros(1, np.int64), 0
    for token in range(5):
        decoder.step(token, token, table)
        check_step(graphs, experts)
        splits += sum(0 < rows < F for layer in graphs.gpu_rows for rows in layer.values())
    if costs != "sets":  # there it depends on which side was first
        assert (splits > 0) == (costs == "rows")


def test_a_slot_holds_several_of_these_experts():
    assert slot_rows(EXACT) == 14 * F


@pytest.mark.parametrize("tokens,limit", [(1, 100 * US), (512, 2000 * US), (2048, 2000 * US)])
def test_planning_a_layer_of_128_experts_takes_little_time(tokens, limit):
    """About 5 us for a token, whose plans are made once, 150 for a prompt, on a quiet core; the limits are wide."""
    layers = weights_of("bf16", "f32", 0, 128, 64, 2)
    experts = orchestrator(layers, [[*range(32)]] * LAYERS, COSTS["sets"])
    token, rng, samples = Token(experts, 8, 2), np.random.default_rng(0), []
    for _ in range(15):
        counts = np.zeros(128, np.int64)
        np.add.at(counts, np.concatenate([rng.permutation(128)[:8] for _ in range(tokens)]), 1)
        chosen = np.flatnonzero(counts).tolist()
        begun = time.perf_counter()
        if tokens == 1:
            token.compute(0, chosen)
        else:
            experts.split(0, counts, (), 1e-4 * rng.random(), tokens)
        samples.append(time.perf_counter() - begun)
    assert median(samples) < limit


def test_the_expected_seconds_of_a_step_grow_with_tokens_and_missing_experts():
    """One token: eight experts by the CPU. Many: each expert once, on the side that is later by the plan."""
    none, half, every = (
        orchestrator(EXACT, [list(range(0, E, step)) if step else [] for _ in range(LAYERS)], COSTS["sets"], rows=4 * F)
        for step in (0, 2, 1)
    )
    one = none.step_seconds(1, K)
    assert one == pytest.approx(LAYERS * Token(none, K, D).compute(0, range(K))[0].seconds, rel=0.3)
    assert every.step_seconds(512, K) == pytest.approx(LAYERS * E * GPU(round(512 * K / E)))
    for tokens in (1, 16, 512):
        assert none.step_seconds(tokens, K) >= half.step_seconds(tokens, K) >= every.step_seconds(tokens, K) > 0
    seconds = [none.step_seconds(tokens, K) for tokens in (1, 8, 64, 512)]
    assert seconds == sorted(seconds)
