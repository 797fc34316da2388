"""The kernel of decode attention and its conversions against float64 and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numba import njit

from fiddler import kernels
from fiddler.kernels.codegen import scalar_math as arithmetic
from oracles import naive

KINDS = pytest.mark.parametrize("kind", [np.float16, np.float32])


def case(seed, groups, each, size, capacity, kind):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(n, size)).astype(np.float32) for n in (groups * each, groups, groups))
    keys, values = (rng.normal(size=(groups, capacity, size)).astype(kind) for _ in range(2))
    frequencies = (1 / 10000 ** (np.arange(0, size, 2) / size)).astype(np.float32)
    return q, k, v, keys, values, frequencies


def attend(q, k, v, keys, values, position, frequencies, window=None):
    """The kernel for one sequence, on the bits of float16 where keys are that."""
    keys, values = bits(keys), bits(values)
    return kernels.attend_each(q[None], k[None], v[None], [keys], [values], [position], frequencies, window)[0]


def bits(kept):
    return kept.view(np.uint16) if kept.dtype == np.float16 else kept


@KINDS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_attention_is_the_naive_one(kind, data):
    groups, each, pairs = (data.draw(st.integers(1, most)) for most in (3, 4, 40))
    capacity = data.draw(st.integers(1, 90))
    position = data.draw(st.integers(0, capacity - 1))
    window = data.draw(st.one_of(st.none(), st.integers(1, 100)))
    args = case(data.draw(st.integers(0, 2**32 - 1)), groups, each, 2 * pairs, capacity, kind)
    q, k, v, keys, values, frequencies = args
    before = keys.copy(), values.copy()
    out = attend(q, k, v, keys, values, position, frequencies, window)
    expected, rotated = naive.attend_one(q, k, v, *before, position, frequencies, window)
    others = np.arange(capacity) != position
    for kept, old in zip((keys, values), before, strict=True):
        np.testing.assert_array_equal(kept[:, others], old[:, others])
    np.testing.assert_array_equal(values[:, position], v.astype(kind))
    step = np.finfo(kind).eps if kind == np.float16 else 0  # of the rounding to half, which the oracle leaves out
    largest = np.abs(k).max() * 2**0.5
    assert np.abs(keys[:, position] - rotated).max() <= (step + 10 * naive.EPSILON) * largest
    # a score is that far off, a share by the same factor, and an output by as much of what it sums
    score = (step + 10 * naive.EPSILON) * np.abs(q).max() * max(largest, np.abs(before[0]).max()) * (2 * pairs) ** 0.5
    largest = max(np.abs(v).max(), np.abs(before[1]).max())
    assert np.abs(out - expected).max() <= (2 * score + 2 * step + naive.EPSILON) * largest


@KINDS
def test_what_is_no_number_stays_none(kind):
    for spoiled in range(3):
        args = case(2, 2, 2, 8, 20, kind)
        args[spoiled][0, 3] = np.nan
        out = attend(*args[:5], 11, args[5])
        assert np.isnan(out[0]).any()
        assert np.isfinite(out[2:]).all()


def test_old_positions_may_hold_anything_outside_the_window():
    q, k, v, keys, values, frequencies = case(3, 2, 2, 8, 20, np.float32)
    keys[:, :8] = values[:, :8] = np.nan
    keys[:, 12:] = values[:, 12:] = np.nan
    assert np.isfinite(attend(q, k, v, keys, values, 11, frequencies, 4)).all()


@KINDS
@pytest.mark.parametrize("window", [None, 30])
def test_several_sequences_are_each_alone(kind, window):
    """Bit by bit, whatever their lengths and capacities, on one thread and on several."""
    places, capacities = [0, 299, 40, 7, 120, 1], [1, 300, 64, 8, 500, 2]
    cases = [case(n, 2, 4, 64, capacity, kind) for n, capacity in enumerate(capacities)]
    frequencies = cases[0][5]
    kept = [[bits(one[i].copy()) for one in cases] for i in (3, 4)]
    alone = [attend(*one[:5], place, frequencies, window) for one, place in zip(cases, places, strict=True)]
    before, most = [[half.copy() for half in halves] for halves in kept], kernels.thread_count()
    q, k, v = (np.stack([one[i] for one in cases]) for i in range(3))
    try:
        for threads in (1, most):
            kernels.set_threads(threads)
            keys, values = ([half.copy() for half in halves] for halves in before)
            together = kernels.attend_each(q, k, v, keys, values, places, frequencies, window)
            np.testing.assert_array_equal(together, np.stack(alone))
            for one, key, value in zip(cases, keys, values, strict=True):
                np.testing.assert_array_equal(key, bits(one[3]))  # where `alone` has written
                np.testing.assert_array_equal(value, bits(one[4]))
    finally:
        kernels.set_threads(most)


def test_no_sequence_at_all():
    none = np.empty((0, 4, 8), np.float32)
    assert kernels.attend_each(none, none[:, :2], none[:, :2], [], [], [], np.ones(4, np.float32)).shape == (0, 4, 8)


def test_bad_arguments_stop_at_the_door():
    q, k, v, keys, values, frequencies = case(4, 2, 2, 8, 20, np.float32)
    good = {"q": q[None], "k": k[None], "v": v[None], "keys": [keys], "values": [values], "positions": [5]}
    good["frequencies"] = frequencies
    kernels.attend_each(**good)
    bad = {
        "q": [good["q"][:, :3], good["q"][..., :6], q, good["q"].astype(np.float64), np.concatenate([good["q"]] * 2)],
        "k": [good["k"][:, :1], good["k"][:, ::-1], good["k"].astype(np.float16), k],
        "v": [good["v"][:, :1]],
        "keys": [[keys[0]], [keys.astype(np.float64)], [keys.astype(np.float16)], [], [keys, keys], [keys[:1]]],
        "values": [[values[:, :19]], [values.view(np.uint16)[..., :8].copy()], [values[:, ::-1]]],
        "frequencies": [frequencies[:3]],
        "positions": [[-1], [20], [1, 2]],
        "window": [0, -1],
    }
    for name, wrong in bad.items():
        for value in wrong:
            with pytest.raises(ValueError):
                kernels.attend_each(**good | {name: value})


@njit
def halves(bits, values, back):
    for i in range(bits.size):
        values[i] = arithmetic.from_half(bits[i])
        back[i] = arithmetic.to_half(values[i])


@njit
def rounded(values, bits):
    for i in range(bits.size):
        bits[i] = arithmetic.to_half(values[i])


def test_every_half_is_read_exactly_and_written_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values, back = np.empty(bits.size, np.float32), np.empty(bits.size, np.uint16)
    halves(bits, values, back)
    np.testing.assert_array_equal(values, bits.view(np.float16).astype(np.float32))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.isnan(back[~number].view(np.float16)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_floats_round_to_halves_as_numpy_rounds(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 32, 4000, np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    bits = rng.integers(0, 0x7C00, 4000)
    low, high = ((bits + more).astype(np.uint16).view(np.float16).astype(np.float64) for more in (0, 1))
    ties = np.where(bits == 0x7BFF, 65520.0, (low + high) / 2)
    values = np.concatenate([values, low, ties, -ties, rng.normal(size=4000)]).astype(np.float32)
    bits = np.empty(values.size, np.uint16)
    rounded(values, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits[number], expected.view(np.uint16)[number])
    assert np.isnan(bits[~number].view(np.float16)).all()
