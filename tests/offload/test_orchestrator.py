"""Both sides on the CPU: every mix of residents, CPU, streaming and splits gives the sum that float64 gives."""

from __future__ import annotations

import gc
import weakref
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fiddler.device.weight_copy import HostCopy
from fiddler.offload.plan import Costs, Curve
from fiddler.telemetry.recorder import Meter
from oracles import naive
from oracles.both_sides import EXACT, LAYERS, MOST, D, E, F, orchestrator, weights_of

COSTS = {
    "CPU alone": Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), inf, 0.0),
    "streamed": Costs(Curve((1,), (1e6,)), Curve((1,), (0.0,)), 1.0, 0.0),
    "split": Costs(Curve((1, 64), (1.0, 4.0)), Curve((1,), (0.0,)), 1.0, 0.0),
    "mostly CPU": Costs(Curve((1, 64), (1.0, 2.0)), Curve((1,), (0.0,)), 6.0, 0.0),
}


class BlockingCopy(HostCopy):
    """A link that keeps its caller busy, so that it gets a thread."""

    blocks = True


KINDS = {"exact": EXACT, "f16": weights_of("f16", "f32"), "fast": weights_of("bf16", "bf16")}


def step(rng, tokens, k):
    x = rng.normal(size=(tokens, D)).astype(np.float32)
    ids = np.array([rng.permutation(E)[:k] for _ in range(tokens)], np.int64).reshape(tokens, k)
    return x, ids, rng.random((tokens, k)).astype(np.float32)


def scale(w, x, ids, weights):
    """The root of the sum of squares of all that is added up: what rounding errors are measured against.

    The sum itself may be small by chance, and is then no measure of them.
    """
    total = 0.0
    for t in range(len(x)):
        for j, e in enumerate(ids[t]):
            gate, up, down = (naive.from_bits(bits[e], w.variant.weights) for bits in (w.gate, w.up, w.down))
            g, u = gate @ x[t], up @ x[t]
            total += weights[t, j] ** 2 * (down**2 @ (g / (1 + np.exp(-g)) * u) ** 2).sum()
    return total**0.5


def check(made, layers, layer, x, ids, weights):
    w = layers[layer]
    rounded = w.variant.activations == "bf16"
    expected, tolerance = naive.expert_ffn(x, ids, weights, w.gate, w.up, w.down, w.variant.weights, rounded=rounded)
    assert made.shape == x.shape
    if rounded:  # torch rounds gate's, up's and down's products to 16 bits, too: four roundings, 2**-9 at most each
        assert np.linalg.norm(made - expected) <= 4 * 2**-9 * scale(w, x, ids, weights)
    else:
        assert (np.abs(made - expected) <= tolerance * 2).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("costs", COSTS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_mix_is_the_same_sum(kind, costs, data):
    layers = KINDS[kind]
    placed = [data.draw(st.lists(st.integers(0, E - 1), unique=True, max_size=E)) for _ in range(LAYERS)]
    blocking = data.draw(st.booleans())
    both = orchestrator(
        layers, placed, COSTS[costs], BlockingCopy() if blocking else None, data.draw(st.sampled_from([64, 128]))
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    k = data.draw(st.integers(1, 3))
    for tokens in data.draw(st.lists(st.one_of(st.just(1), st.integers(0, MOST)), min_size=1, max_size=3)):
        for layer in range(LAYERS):
            x, ids, weights = step(rng, tokens, k)
            made = both(layer, *(torch.from_numpy(array) for array in (x, ids, weights)))
            check(made.numpy(), layers, layer, x, ids, weights)


@pytest.mark.parametrize("costs", COSTS)
def test_one_expert_for_all(costs):
    both = orchestrator(EXACT, [[1], [], [0, 2]], COSTS[costs])
    x, ids, weights = step(np.random.default_rng(3), MOST, 1)
    ids[:] = 3
    made = both(1, *(torch.from_numpy(array) for array in (x, ids, weights)))
    check(made.numpy(), EXACT, 1, x, ids, weights)


def test_no_sides_work_is_left_out_or_done_twice():
    """Bytes that the recorder is told of: every missing expert's weights once, by one side or the other."""
    layers, meter = EXACT, Meter()
    for costs in COSTS.values():
        both = orchestrator(layers, [[0], [1], []], costs)
        both._recorder = meter
        for layer in range(LAYERS):
            x, ids, weights = step(np.random.default_rng(layer), 3, 2)
            meter.clear()
            both(layer, *(torch.from_numpy(array) for array in (x, ids, weights)))
            missing = {e for e in ids.reshape(-1).tolist() if (layer, e) not in both.residents}
            assert meter.nbytes["experts"] + meter.nbytes["link"] == len(missing) * 3 * layers[0].gate[0].nbytes


def test_weights_for_the_next_layer_are_sent_ahead_and_used():
    both, expert, meter = orchestrator(EXACT, [[], [], []], COSTS["streamed"]), EXACT[0].gate[0].nbytes * 3, Meter()
    both._recorder = meter
    rng = np.random.default_rng(0)

    def forward():  # as the model's step
        x, ids, weights = step(rng, 60, 2)
        both(0, *(torch.from_numpy(array) for array in (x, ids, weights)))
        layer, parts = both._ahead
        assert layer == 1
        assert sum(part.end - part.begin for part in parts) == F
        assert meter.nbytes["link"] == (E + 1) * expert
        x, ids, weights = step(rng, 60, 2)
        made = both(1, *(torch.from_numpy(array) for array in (x, ids, weights)))
        check(made.numpy(), EXACT, 1, x, ids, weights)
        assert meter.nbytes["link"] == (2 * E + 1) * expert  # one of layer 1 was there, one of layer 2 is now
        # whoever turns out to have no tokens was sent in vain
        ahead = both._ahead[1][0].expert
        x, ids, weights = step(rng, 30, 1)
        ids[ids == ahead] = (ahead + 1) % E
        made = both(2, *(torch.from_numpy(array) for array in (x, ids, weights)))
        check(made.numpy(), EXACT, 2, x, ids, weights)
        return made

    both.beside(forward, 60)
    assert meter.nbytes["link"] == 3 * E * expert


def test_nothing_is_sent_ahead_for_a_last_layer_that_has_few_tokens():
    both, rng = orchestrator(EXACT, [[], [], []], COSTS["streamed"]), np.random.default_rng(0)

    def forward():
        for layer in range(LAYERS):
            x, ids, weights = step(rng, 60 if layer < LAYERS - 1 else 1, 2)
            made = both(layer, *(torch.from_numpy(array) for array in (x, ids, weights)))
            assert (both._ahead[1] != []) == (layer == 0)
            check(made.numpy(), EXACT, layer, x, ids, weights)
        return made

    both.beside(forward, 1)


@pytest.mark.parametrize("weight_copy", [HostCopy, BlockingCopy])
def test_a_step_that_was_broken_off_leaves_nothing_behind(weight_copy):
    both = orchestrator(EXACT, [[], [], []], COSTS["streamed"], weight_copy())
    rng = np.random.default_rng(0)
    x, ids, weights = step(rng, 60, 2)
    both(0, *(torch.from_numpy(array) for array in (x, ids, weights)))
    assert both._ahead[1]
    x, ids, weights = step(rng, 60, 2)
    check(both(0, *(torch.from_numpy(array) for array in (x, ids, weights))).numpy(), EXACT, 0, x, ids, weights)


def test_numbers_that_are_none_pass_through():
    both = orchestrator(EXACT, [[0, 1], [], []], COSTS["split"])
    x, ids, weights = step(np.random.default_rng(0), 4, 2)
    x[2, 5] = np.nan
    made = both(0, *(torch.from_numpy(array) for array in (x, ids, weights))).numpy()
    assert np.isnan(made[2]).all()
    assert np.isfinite(made[[0, 1, 3]]).all()


def test_a_step_longer_than_there_is_room_for_goes_in_parts():
    both = orchestrator(EXACT, [[0], [1], []], COSTS["split"])
    rng = np.random.default_rng(1)
    for layer in range(LAYERS):
        x, ids, weights = step(rng, 2 * MOST + 5, 2)
        made = both(layer, *(torch.from_numpy(array) for array in (x, ids, weights)))
        check(made.numpy(), EXACT, layer, x, ids, weights)


def test_freed_by_counting_references():
    """A GPU's memory and a registered mapping must not wait for the collector of cycles."""
    gc.disable()
    try:
        both = orchestrator(EXACT, [[0], [1], []], COSTS["split"])
        x, ids, weights = step(np.random.default_rng(1), 3, 2)
        both(0, *(torch.from_numpy(array) for array in (x, ids, weights)))
        both.split_one(0, (1, 2))
        gone = weakref.ref(both), weakref.ref(both.residents)
        del both
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_one_token_has_its_plan_and_the_time_it_should_take():
    both = orchestrator(EXACT, [[0], [], []], COSTS["split"])
    split = both.split_one(0, (0, 3))
    assert set(split.gpu_rows) == {3}
    assert split.cpu_rows[3] + split.gpu_rows[3] == F
    assert split.seconds == both.split(0, np.array([1, 0, 0, 1, 0])).seconds > 0
    # a link that blocks would only begin when the CPU is done
    blocking = orchestrator(EXACT, [[0], [], []], COSTS["split"], BlockingCopy())
    assert blocking.split_one(0, (0, 3)).cpu_rows.tolist() == [0, 0, 0, F, 0]


class Underway(HostCopy):
    """A link on which nothing arrives."""

    def event(self):
        class Ahead:
            record = wait = synchronize = staticmethod(lambda: None)
            query = staticmethod(lambda: False)

        return Ahead()


def test_what_is_still_on_the_link_keeps_it_from_carrying_more():
    """Two slots of 128 and 72 rows, about half of the first having passed; F rows take a second."""
    both = orchestrator(EXACT, [[], [], []], COSTS["split"], Underway())
    ahead = list(both.ring.send(0, 2, 0, 200))
    late = both._until_arrived(ahead)
    assert late == pytest.approx((128 / 2 + 72) / F)
    counts = np.array([1] * E)
    on_cpu = [both.split(0, counts, (), later).cpu_rows.sum() for later in (0.0, late, 3 * late)]
    assert on_cpu[0] < on_cpu[1] < on_cpu[2]
    both.ring.release()
    assert orchestrator(EXACT, [[], [], []], COSTS["split"])._until_arrived(ahead[:0]) == 0.0


def test_the_cpu_is_left_out_where_its_sums_are_too_much_to_hand_over():
    both = orchestrator(EXACT, [[], [], []], COSTS["split"])
    counts = np.array([1] * E)
    assert both.split(0, counts, tokens=1).cpu_rows.any()
    assert not both.split(0, counts, tokens=F * 6 // 4 * E).cpu_rows.any()
