"""The orchestrator with both sides on the CPU: every mix of residents, streaming and splits matches float64."""

from __future__ import annotations

import gc
import weakref
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fiddler.cost_curve import Curve
from fiddler.device.weight_copy import HostCopy
from fiddler.offload.plan import Costs
from fiddler.telemetry.recorder import Meter
from oracles import naive
from oracles.both_sides import EXACT, LAYERS, MAX_TOKENS, D, E, F, Token, compute_layer, orchestrator, weights_of

COSTS = {
    "CPU alone": Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), inf, 0.0),
    "streamed": Costs(Curve((1,), (1e6,)), Curve((1,), (0.0,)), 1.0, 0.0),
    "split": Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0),
    "mostly CPU": Costs(Curve((1, 64), (1.0, 2.0)), Curve((1,), (0.0,)), 6.0, 0.0),
}


class BlockingCopy(HostCopy):
    """Blocks its caller while it copies, as `BounceBufferCopy` does."""

    blocks = True


KINDS = {
    "exact": EXACT,
    "f16": weights_of("f16", "f32"),
    "fast": weights_of("bf16", "bf16"),
    "apart": weights_of("bf16", "f32", apart=True),
}


def step(rng, tokens, k):
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    expert_ids = np.array([rng.permutation(E)[:k] for _ in range(tokens)], np.int64).reshape(tokens, k)
    return x, expert_ids, rng.random((tokens, k)).astype(np.float32)


def scale(w, x, expert_ids, routing_weights):
    """The root of the addends' sum of squares, against which rounding errors are measured.

    The sum itself may be small by chance.
    """
    total = 0.0
    for t in range(len(x)):
        for j, e in enumerate(expert_ids[t]):
            gate, up, down = (naive.from_bits(bits[e], w.variant.weights) for bits in (w.gate, w.up, w.down))
            g, u = gate @ x[t], up @ x[t]
            total += routing_weights[t, j] ** 2 * (down**2 @ (g / (1 + np.exp(-g)) * u) ** 2).sum()
    return total**0.5


def check(output, layers, layer, x, expert_ids, routing_weights):
    w = layers[layer]
    rounded = w.variant.activations == "bf16"
    expected, tolerance = naive.expert_ffn(
        x, expert_ids, routing_weights, w.gate, w.up, w.down, w.variant.weights, rounded=rounded
    )
    assert output.shape == x.shape
    if rounded:  # torch rounds gate's, up's and down's products to 16 bits, too: four roundings, 2**-9 at most each
        assert np.linalg.norm(output - expected) <= 4 * 2**-9 * scale(w, x, expert_ids, routing_weights)
    else:
        assert (np.abs(output - expected) <= tolerance * 2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_mix_of_residents_cpu_and_streaming_matches_float64(kind, costs, data):
    layers = KINDS[kind]
    placed = [data.draw(st.lists(st.integers(0, E - 1), unique=True, max_size=E)) for _ in range(LAYERS)]
    blocking = data.draw(st.booleans())
    experts = orchestrator(
        layers, placed, COSTS[costs], BlockingCopy() if blocking else None, data.draw(st.sampled_from([64, 128]))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    k = data.draw(st.integers(1, 3))
    for tokens in data.draw(st.lists(st.one_of(st.just(1), st.integers(0, MAX_TOKENS)), min_size=1, max_size=3)):
        for layer in range(LAYERS):
            x, expert_ids, routing_weights = step(rng, tokens, k)
            output = compute_layer(experts, layer, x, expert_ids, routing_weights)
            check(output, layers, layer, x, expert_ids, routing_weights)


@pytest.mark.parametrize("costs", COSTS)
def test_tokens_that_all_go_to_one_expert_match_float64(costs):
    experts = orchestrator(EXACT, [[1], [], [0, 2]], COSTS[costs])
    x, expert_ids, routing_weights = step(np.random.default_rng(3), MAX_TOKENS, 1)
    expert_ids[:] = 3
    output = compute_layer(experts, 1, x, expert_ids, routing_weights)
    check(output, EXACT, 1, x, expert_ids, routing_weights)


def test_every_missing_expert_is_computed_once_by_the_cpu_or_the_gpu():
    """The recorded bytes are those of every missing expert, once."""
    layers, meter = EXACT, Meter()
    for costs in COSTS.values():
        experts = orchestrator(layers, [[0], [1], []], costs, recorder=meter)
        for layer in range(LAYERS):
            x, expert_ids, routing_weights = step(np.random.default_rng(layer), 3, 2)
            meter.clear()
            compute_layer(experts, layer, x, expert_ids, routing_weights)
            missing = {e for e in expert_ids.reshape(-1).tolist() if (layer, e) not in experts.residents}
            assert meter.nbytes["experts"] + meter.nbytes["copy"] == len(missing) * 3 * layers[0].gate[0].nbytes


def test_experts_prefetched_for_the_next_layer_are_used_there():
    expert, meter = EXACT[0].gate[0].nbytes * 3, Meter()
    experts = orchestrator(EXACT, [[], [], []], COSTS["streamed"], recorder=meter)
    rng = np.random.default_rng(0)

    def forward():  # as the model's step does
        x, expert_ids, routing_weights = step(rng, 60, 2)
        experts.layer(0, *(torch.from_numpy(array) for array in (x, expert_ids, routing_weights)))
        layer, slots = experts.prefetcher.sent
        assert layer == 1
        assert sum(part.end - part.begin for parts in slots for part in parts) == F
        assert meter.nbytes["copy"] == (E + 1) * expert
        x, expert_ids, routing_weights = step(rng, 60, 2)
        output = experts.layer(1, *(torch.from_numpy(array) for array in (x, expert_ids, routing_weights)))
        check(output.numpy(), EXACT, 1, x, expert_ids, routing_weights)
        assert meter.nbytes["copy"] == (2 * E + 1) * expert  # of layer 1 one was prefetched, of layer 2 one is now
        # a prefetched expert without tokens was copied in vain
        prefetched = experts.prefetcher.sent[1][0][0].expert
        x, expert_ids, routing_weights = step(rng, 30, 1)
        expert_ids[expert_ids == prefetched] = (prefetched + 1) % E
        output = experts.layer(2, *(torch.from_numpy(array) for array in (x, expert_ids, routing_weights)))
        check(output.numpy(), EXACT, 2, x, expert_ids, routing_weights)
        return output

    experts.step(forward, 60)
    assert meter.nbytes["copy"] == 3 * E * expert


def test_nothing_is_prefetched_for_a_last_layer_with_few_tokens():
    experts, rng = orchestrator(EXACT, [[], [], []], COSTS["streamed"]), np.random.default_rng(0)

    def forward():
        for layer in range(LAYERS):
            x, expert_ids, routing_weights = step(rng, 60 if layer < LAYERS - 1 else 1, 2)
            output = experts.layer(layer, *(torch.from_numpy(array) for array in (x, expert_ids, routing_weights)))
            assert (experts.prefetcher.sent[1] != []) == (layer == 0)
            check(output.numpy(), EXACT, layer, x, expert_ids, routing_weights)
        return output

    experts.step(forward, 1)


@pytest.mark.parametrize("weight_copy", [HostCopy, BlockingCopy])
def test_the_step_after_an_aborted_one_matches_float64(weight_copy):
    experts = orchestrator(EXACT, [[], [], []], COSTS["streamed"], weight_copy())
    rng = np.random.default_rng(0)
    x, expert_ids, routing_weights = step(rng, 60, 2)
    compute_layer(experts, 0, x, expert_ids, routing_weights)
    assert experts.prefetcher.sent[1]
    x, expert_ids, routing_weights = step(rng, 60, 2)
    check(compute_layer(experts, 0, x, expert_ids, routing_weights), EXACT, 0, x, expert_ids, routing_weights)


def test_nan_reaches_the_output_of_its_own_token_only():
    experts = orchestrator(EXACT, [[0, 1], [], []], COSTS["split"])
    x, expert_ids, routing_weights = step(np.random.default_rng(0), 4, 2)
    x[2, 5] = np.nan
    output = compute_layer(experts, 0, x, expert_ids, routing_weights)
    assert np.isnan(output[2]).all()
    assert np.isfinite(output[[0, 1, 3]]).all()


def test_a_step_of_more_tokens_than_the_buffers_hold_is_divided():
    experts = orchestrator(EXACT, [[0], [1], []], COSTS["split"])
    rng = np.random.default_rng(1)
    for layer in range(LAYERS):
        x, expert_ids, routing_weights = step(rng, 2 * MAX_TOKENS + 5, 2)
        output = compute_layer(experts, layer, x, expert_ids, routing_weights)
        check(output, EXACT, layer, x, expert_ids, routing_weights)


def test_an_orchestrator_is_freed_without_the_garbage_collector():
    """GPU memory and a pinned mapping must not wait for the cyclic collector."""
    gc.disable()
    try:
        experts = orchestrator(EXACT, [[0], [1], []], COSTS["split"])
        x, expert_ids, routing_weights = step(np.random.default_rng(1), 3, 2)
        compute_layer(experts, 0, x, expert_ids, routing_weights)
        Token(experts, 2).compute(0, (1, 2))
        gone = weakref.ref(experts), weakref.ref(experts.residents)
        del experts
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_the_split_of_one_token_covers_its_missing_expert_and_predicts_the_seconds():
    experts = orchestrator(EXACT, [[0], [], []], COSTS["split"])
    token = Token(experts, 2)
    plan, gpu_rows = token.compute(0, (0, 3))
    assert set(gpu_rows) == {3}
    assert token.bound.cpu_rows[3] + gpu_rows[3] == F
    assert (plan.missing, plan.cpu_rows, plan.gpu_rows) == (1, token.bound.cpu_rows.sum(), gpu_rows[3])
    assert plan.seconds == experts.split(0, np.array([1, 0, 0, 1, 0])).seconds > 0
    # a blocking copy would only begin when the CPU is done
    blocking = orchestrator(EXACT, [[0], [], []], COSTS["split"], BlockingCopy())
    token = Token(blocking, 2)
    token.compute(0, (0, 3))
    assert token.bound.cpu_rows.tolist() == [0, 0, 0, F, 0]


class StalledCopy(HostCopy):
    """A copy whose events are never reached."""

    def event(self):
        class PendingEvent:
            record = wait = synchronize = staticmethod(lambda: None)
            query = staticmethod(lambda: False)

        return PendingEvent()


def test_copies_still_under_way_leave_more_rows_to_the_cpu():
    """Two slots of 128 and 72 rows are under way, the first about half copied; F rows take one second."""
    experts = orchestrator(EXACT, [[], [], []], COSTS["split"], StalledCopy())
    ahead = list(experts.ring.send(0, [(2, 0, 200)]))
    delay = experts._copy_seconds_left(ahead)
    assert delay == pytest.approx((128 / 2 + 72) / F)
    counts = np.array([1] * E)
    on_cpu = [experts.split(0, counts, (), seconds).cpu_rows.sum() for seconds in (0.0, delay, 3 * delay)]
    assert on_cpu[0] < on_cpu[1] < on_cpu[2]
    experts.ring.release()
    assert orchestrator(EXACT, [[], [], []], COSTS["split"])._copy_seconds_left(ahead[:0]) == 0.0


def test_the_cpu_gets_no_rows_where_copying_its_sums_takes_too_long():
    experts = orchestrator(EXACT, [[], [], []], COSTS["split"])
    counts = np.array([1] * E)
    assert experts.split(0, counts, tokens=1).cpu_rows.any()
    assert not experts.split(0, counts, tokens=F * 6 // 4 * E).cpu_rows.any()
