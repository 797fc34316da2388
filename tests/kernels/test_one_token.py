"""One token's division of missing experts, and the kernel's call with bound arrays."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from fiddler.kernels import ExpertFfn, KernelVariant
from fiddler.kernels.machine.signals import SIGNAL_STRIDE
from fiddler.kernels.matmul import grouped
from fiddler.kernels.one_token import NOT_YET, SEND_HERE, Signal, TokenDivision, divide
from fiddler.kernels.token_layer import TokenLayer
from oracles.naive import to_bits

K, F = 3, 64
NUMBER = 1


def no_signals():
    return np.zeros(len(Signal) * SIGNAL_STRIDE, np.uint32)


def division_of(experts):
    """A layer whose inputs have arrived, with a thread that waits to send."""
    chosen, signals = np.zeros((1, K), np.float32), no_signals()
    signals[Signal.ARRIVED * SIGNAL_STRIDE] = signals[Signal.SENDING * SIGNAL_STRIDE] = NUMBER
    return chosen, TokenDivision(chosen, experts, F, signals)


def products_of(division, experts, width=96):
    """The products of a layer of random experts, bound to a division; their x, routing weights and output."""
    rng, variant = np.random.default_rng(0), KernelVariant(kernels.choose_tier(), "bf16", "bf16")
    shapes = (experts, F, width), (experts, F, width), (experts, width, F)
    ffn = ExpertFfn(*(to_bits(rng.normal(size=shape), "bf16") for shape in shapes), variant)
    x, out = np.zeros((1, width), np.float32), np.full((1, width), np.nan, np.float32)
    weights = np.zeros((1, K), np.float32)
    return ffn.bind(x, division.expert_ids, weights, division.cpu_rows, out), ffn, x, weights, out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_missing_expert_s_rows_go_to_one_side_as_the_plan_for_their_number_says(data):
    """Several layers in turn: nothing of the one before is left."""
    experts = data.draw(st.integers(K, 9))
    chosen, division = division_of(experts)
    rows = [data.draw(st.lists(st.sampled_from([0, 2, 32, F]), min_size=n, max_size=n)) for n in range(K + 1)]
    plans, counts, expected_counts = division.plans(rows), np.zeros(experts, np.int64), np.zeros(experts, np.int64)
    for _ in range(3):
        missing = np.array(data.draw(st.lists(st.booleans(), min_size=experts, max_size=experts)))
        ids = data.draw(st.permutations(range(experts)))[:K]
        chosen[:] = ids
        expected_counts[ids] += 1
        on_gpu = dict(zip([e for e in ids if missing[e]], rows[missing[ids].sum()], strict=True))
        assert divide(division.arrays(missing, counts), NUMBER, F, plans) == len(on_gpu)
        assert division.expert_ids.tolist() == [ids]
        assert division.cpu_rows.tolist() == [F - on_gpu[e] if e in on_gpu else 0 for e in range(experts)]
        streamed = [(ids.index(e), count) for e, count in on_gpu.items() if count]
        assert [(j, count) for j, count in division.gpu_rows.tolist() if count] == streamed
        assert division.gpu_rows[: len(streamed)].tolist() == [[*each] for each in streamed]
    assert counts.tolist() == expected_counts.tolist()


@pytest.mark.parametrize("wrong", [-1, 4, 1e30, np.nan, np.inf])
def test_an_expert_id_outside_the_layer_is_an_error_that_changes_nothing(wrong):
    chosen, division = division_of(4)
    chosen[:] = 0, wrong, 2
    counts = np.zeros(4, np.int64)
    layer = TokenLayer(division, np.ones(4, np.bool_), counts, products_of(division, 4)[0])
    with pytest.raises(ValueError, match=r"lies outside 0\.\.3"):
        layer(NUMBER, division.plans([(0,) * n for n in range(K + 1)]), None)
    assert not counts.any()
    assert not division.cpu_rows.any()


@pytest.mark.parametrize(
    "call",
    [
        lambda division: TokenDivision(np.zeros((2, K), np.float32), 4, F, no_signals()),
        lambda division: TokenDivision(np.zeros((1, K)), 4, F, no_signals()),
        lambda division: TokenDivision(np.zeros((1, K), np.float32), 4, F, no_signals()[1:]),
        lambda division: division.arrays(np.ones(5, np.bool_), np.zeros(4, np.int64)),
        lambda division: division.arrays(np.ones(4, np.bool_), np.zeros(4)),
        lambda division: division.plans([(0,) * n for n in range(K)]),
        lambda division: division.plans([(F + 2,) * n for n in range(K + 1)]),
    ],
)
def test_arrays_that_do_not_fit_are_errors(call):
    with pytest.raises(ValueError):
        call(division_of(4)[1])


def test_a_bound_call_gives_the_bits_of_a_call_for_whatever_its_arrays_hold():
    experts, width, hidden = 6, 96, 64
    rng, variant = np.random.default_rng(0), KernelVariant(kernels.choose_tier(), "bf16", "bf16")
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    ffn = ExpertFfn(*(to_bits(rng.normal(size=shape), "bf16") for shape in shapes), variant)
    x, out = np.zeros((1, width), np.float32), np.zeros((1, width), np.float32)
    ids, weights, rows = np.zeros((1, K), np.int64), np.zeros((1, K), np.float32), np.zeros(experts, np.int64)
    call = ffn.bind(x, ids, weights, rows, out)
    for _ in range(5):
        x[:], ids[:], weights[:] = rng.normal(size=width), rng.permutation(experts)[:K], rng.random(K)
        rows[:] = 2 * rng.integers(0, hidden // 2 + 1, experts)
        assert call()
        np.testing.assert_array_equal(out, ffn(x, ids, weights, rows))
    ids[0, 1] = experts
    assert not call()
    for arrays in ((x, ids.astype(np.int32), weights, rows), (x, ids, weights.astype(float), rows)):
        with pytest.raises(ValueError, match="to bind"):
            ffn.bind(*arrays, out)
    with pytest.raises(ValueError, match="out is"):
        ffn.bind(x, ids, weights, rows, out[0])


@pytest.mark.parametrize("number", [1, 2**31, 2**32 - 1, 2**32, 2**32 + 7])
def test_a_layer_is_divided_once_its_inputs_arrive_and_says_who_sends(number):
    """Numbers are compared modulo 2**32."""
    chosen, division = division_of(4)
    chosen[:] = 0, 1, 2
    signals, missing = division.signals, np.array([True, False, True, True])
    arrays, plans = division.arrays(missing, np.zeros(4, np.int64)), division.plans([(0,) * n for n in range(K + 1)])

    def let(signal, value):
        signals[signal * SIGNAL_STRIDE] = value % 2**32

    let(Signal.ARRIVED, number - 1)
    let(Signal.DIVIDED, number - 1)
    let(Signal.SENDING, 0)
    assert divide(arrays, number, F, plans) == NOT_YET
    assert not division.cpu_rows.any()
    let(Signal.ARRIVED, number)
    assert divide(arrays, number, F, plans) == 2 + SEND_HERE
    assert signals[Signal.DIVIDED * SIGNAL_STRIDE] == (number - 1) % 2**32  # whoever sends sets it
    let(Signal.SENDING, 1)
    let(Signal.ARRIVED, number + 5)
    assert divide(arrays, number, F, plans) == 2
    assert signals[Signal.DIVIDED * SIGNAL_STRIDE] == number % 2**32


def test_the_wait_for_a_layer_ends_when_another_thread_says_that_it_arrived():
    chosen, division = division_of(4)
    chosen[:] = 0, 1, 2
    arrays = division.arrays(np.ones(4, np.bool_), np.zeros(4, np.int64))
    plans = division.plans([(0,) * n for n in range(K + 1)])

    asked = threading.Event()

    def arrive():
        assert asked.wait(10)
        division.signals[Signal.ARRIVED * SIGNAL_STRIDE] = NUMBER + 1

    thread = threading.Thread(target=arrive)
    thread.start()
    results = []
    while not results or results[-1] == NOT_YET:
        results.append(divide(arrays, NUMBER + 1, F, plans))
        asked.set()
    thread.join()
    assert results[-1] == K
    assert len(results) > 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_layer_is_divided_and_computed_in_a_call_whoever_sends(threads, parallel):
    """In one compiled call, or, where that cannot do all, from Python behind it: the bits are those of the products."""
    chosen, division = division_of(4)
    products, ffn, x, weights, out = products_of(division, 4)
    products.parallel, signals, missing = parallel, division.signals, np.array([True, False, True, True])
    counts, sent, rng = np.zeros(4, np.int64), [], np.random.default_rng(1)
    layer = TokenLayer(division, missing, counts, products)
    plans = division.plans([(), (32,), (0, F), (0, 0, 0)])
    before = kernels.thread_count()
    kernels.set_threads(threads)
    try:
        for number in range(NUMBER + 1, NUMBER + 13):
            assert layer(number, plans, sent.append) == NOT_YET
            x[:], weights[:], chosen[:] = rng.normal(size=x.shape), rng.random(K), rng.permutation(4)[:K]
            out[:], here = np.nan, number % 2
            signals[Signal.ARRIVED * SIGNAL_STRIDE], signals[Signal.SENDING * SIGNAL_STRIDE] = number, not here
            signals[Signal.SUMMED * SIGNAL_STRIDE] = number - 1
            if number > 10:  # another thread has the kernels' workspace: this one is too small
                grouped.workspace.words = np.empty(0, np.float32)
            left, sent_before, begun = missing[chosen[0].astype(int)].sum(), len(sent), time.perf_counter()
            assert layer(number, plans, sent.append) == left
            assert begun <= layer.times[0] <= layer.times[1] <= time.perf_counter()
            assert sent[sent_before:] == [left] * here
            assert signals[Signal.SUMMED * SIGNAL_STRIDE] == number
            expected = ffn(x, division.expert_ids, weights, division.cpu_rows)
            np.testing.assert_array_equal(out, expected)
            if number == 7:
                missing[:] = False  # as where they were loaded: the CPU has no part
            elif number == 9:
                missing[:] = True
    finally:
        kernels.set_threads(before)
    assert counts.sum() == 12 * K
    other = TokenDivision(chosen, 4, F, signals)
    with pytest.raises(ValueError, match="have not the expert ids"):
        TokenLayer(other, missing, counts, products)
