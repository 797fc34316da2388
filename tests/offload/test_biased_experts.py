"""Experts with biases, as gpt-oss has, divided between both sides on the CPU: each bias is added exactly once."""

from __future__ import annotations

from functools import partial
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fiddler.cost_curve import Curve
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.offload.expert_biases import ExpertBiases
from fiddler.offload.feed_forward import feed_forward, matrix_in
from fiddler.offload.plan import Costs
from fiddler.telemetry.recorder import SILENT
from oracles.biased_experts import biased_layer, of_experts
from oracles.both_sides import MAX_TOKENS, Token, compute_layer, orchestrator
from oracles.token_graphs import RandomGraphs, check_step

E, F, D, LAYERS, K = 5, 256, 64, 3, 3
COSTS = {
    "CPU alone": Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), inf, 0.0),
    "streamed": Costs(Curve((1,), (1e6,)), Curve((1,), (0.0,)), 1.0, 0.0),
    "split": Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0),
}


def layers_of(kinds, activations):
    return [biased_layer(kinds, activations, (E, F, D), seed) for seed in range(LAYERS)]


KINDS = {
    "bf16": (layers_of("bf16", "f32"), 1e-6),
    "bf16, rounded": (layers_of("bf16", "bf16"), 1e-2),
    "f16": (layers_of("f16", "f32"), 1e-6),
    "MXFP4": (layers_of(("mxfp4",) * 3, "f32"), 1e-6),
    "MXFP4, rounded": (layers_of(("mxfp4",) * 3, "q8"), 2e-2),
}


def step(rng, tokens, k=K):
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    expert_ids = np.array([rng.permutation(E)[:k] for _ in range(tokens)], np.int64).reshape(tokens, k)
    return x, expert_ids, rng.random((tokens, k)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_every_mix_of_residents_cpu_and_streaming_adds_each_bias_once(kind, costs, data):
    layers, bound = KINDS[kind]
    placed = [data.draw(st.lists(st.integers(0, E - 1), unique=True, max_size=E)) for _ in range(LAYERS)]
    experts = orchestrator(layers, placed, COSTS[costs], rows=data.draw(st.sampled_from([64, 128, 2 * F])))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for tokens in data.draw(st.lists(st.one_of(st.just(1), st.integers(1, MAX_TOKENS)), min_size=1, max_size=2)):
        for layer in range(LAYERS):
            inputs = step(rng, tokens)
            output = compute_layer(experts, layer, *inputs)
            expected = of_experts(layers[layer], *inputs)
            assert np.linalg.norm(output - expected) <= bound * np.linalg.norm(expected)


def test_the_splits_of_these_layers_divide_experts():
    """Else the test above would not see a bias of down that both sides add."""
    experts = orchestrator(KINDS["MXFP4"][0], [[0], [], [1]], COSTS["split"], rows=128)
    for counts in ([1, 0, 0, 0, 0], [5, 5, 5, 0, 0], [9, 8, 7, 6, 5]):
        assert any(0 < rows < F for rows in experts.split(1, np.array(counts)).gpu_rows.values())


def test_a_prompt_s_prefetched_experts_have_their_biases():
    layers, rng = KINDS["MXFP4"][0], np.random.default_rng(1)
    experts, prefetched = orchestrator(layers, [[], [], []], COSTS["streamed"], rows=F), []

    def forward():
        for layer in range(LAYERS):
            inputs = step(rng, 60)
            output = experts.layer(layer, *map(torch.from_numpy, inputs)).numpy()
            expected = of_experts(layers[layer], *inputs)
            assert np.linalg.norm(output - expected) <= 1e-6 * np.linalg.norm(expected)
            prefetched.append(len(experts.prefetcher.sent[1]))
        return torch.zeros(1)

    experts.step(forward, 60)
    assert prefetched[:2] == [3, 3]


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("rows", [64, 2 * F], ids="slots of {}".format)
def test_both_sides_of_one_token_leave_the_biases_of_down_to_the_kernel_of_residents(costs, rows):
    """What the CPU and the streamed rows add, in chunks where the ring is small; biases of gate and up are theirs."""
    layers = KINDS["bf16"][0]
    experts = orchestrator(layers, [[0], [], [1]], COSTS[costs], rows=rows)
    graphs, streamed = RandomGraphs(experts, K), 0
    decoder, table = DecodeGraphs(graphs, experts, SILENT), np.zeros(1, np.int64)

    def without_down(w, *inputs):
        expected = of_experts(w, *inputs, down_bias=False)
        return expected, 1e-6 * np.abs(expected).max()

    for token in range(6):
        decoder.step(token, token, table)
        streamed += check_step(graphs, experts, without_down)
    assert (streamed > 0) == (costs != "CPU alone")


def test_one_token_s_plans_divide_an_expert():
    experts = orchestrator(KINDS["bf16"][0], [[0], [], [1]], COSTS["split"])
    assert any(0 < rows < F for rows in Token(experts, K, D).compute(1, (0, 1, 2))[1].values())


def test_the_biases_of_layers_lie_one_behind_the_other_and_are_counted():
    layers = KINDS["bf16"][0]
    biases = ExpertBiases.of(layers, torch.device("cpu"))
    assert ExpertBiases.nbytes(layers) == LAYERS * E * (2 * F + D) * 4
    gate, up, down = biases.of_layer(2)
    at = (2 * E + 3) * F
    for flat, matrices in ((gate, layers[2].gate), (up, layers[2].up)):
        assert flat[at : at + F].tolist() == matrices.bias[3].tolist()
    assert down.tolist() == layers[2].down.bias.tolist()
    assert biases.hidden.down is None


@pytest.mark.parametrize("rounded", [False, True])
def test_one_expert_in_torch_is_clamped_as_in_float64(rounded):
    """In pieces of few hidden rows and tokens; NaN stays with its token."""
    w = biased_layer("bf16", "f32", (1, 512, D))
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, D)).astype(np.float32)
    ids, ones = np.zeros((200, 1), np.int64), np.ones((200, 1), np.float32)
    expected = of_experts(w, x, ids, ones, down_bias=False)
    x[7, 3] = np.nan
    kinds, shapes = w.matrix_formats, ((512, D), (512, D), (D, 512))
    matrices = [
        matrix_in(torch.from_numpy(stored[0].view(np.uint8).reshape(-1)), 0, *shape, kind)
        for stored, shape, kind in zip((w.gate, w.up, w.down), shapes, kinds, strict=True)
    ]
    biases = torch.from_numpy(w.gate.bias[0]), torch.from_numpy(w.up.bias[0])
    inputs = torch.from_numpy(x).bfloat16() if rounded else torch.from_numpy(x)
    compute = partial(feed_forward, inputs, *matrices, rounded=rounded, biases=biases, clamped=True)
    for work in (1 << 10, 1 << 30):
        y = compute(work=work).numpy()
        assert np.isnan(y[7]).all()
        others = np.arange(200) != 7
        error = np.linalg.norm(y[others] - expected[others]) / np.linalg.norm(expected[others])
        assert error <= (1e-2 if rounded else 1e-6)
