"""The decode attention kernel against float64, and its float16 conversions against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numba import njit

from fiddler import kernels
from fiddler.kernels.codegen import scalar_math as arithmetic
from oracles import naive
from oracles.paged import from_pool, to_pool

KINDS = pytest.mark.parametrize("kind", [np.float16, np.float32])


def case(seed, groups, heads_per_group, head_dim, capacity, kind):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(n, head_dim)).astype(np.float32) for n in (groups * heads_per_group, groups, groups))
    keys, values = (rng.normal(size=(groups, capacity, head_dim)).astype(kind) for _ in range(2))
    frequencies = (1 / 10000 ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return q, k, v, keys, values, frequencies


def attend(q, k, v, keys, values, position, frequencies, window=None, per_block=8, sinks=None):
    """Run the kernel for one sequence, in blocks of a pool; float16 keys and values go in as their bits."""
    pool, (table,) = to_pool([bits(keys)[None]], [bits(values)[None]], per_block)
    out = kernels.attend_each(q[None], k[None], v[None], pool, 0, [table], [position], frequencies, window, sinks)[0]
    for array, after in zip((keys, values), from_pool(pool, table, keys.shape[1]), strict=True):
        bits(array)[:] = after[0]
    return out


def bits(array):
    return array.view(np.uint16) if array.dtype == np.float16 else array


@KINDS
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_attention_matches_the_float64_oracle(kind, data):
    groups, heads_per_group, pairs = (data.draw(st.integers(1, limit)) for limit in (3, 4, 40))
    capacity = data.draw(st.integers(1, 90))
    position = data.draw(st.integers(0, capacity - 1))
    window = data.draw(st.one_of(st.none(), st.integers(1, 100)))
    args = case(data.draw(st.integers(0, 2**32 - 1)), groups, heads_per_group, 2 * pairs, capacity, kind)
    q, k, v, keys, values, frequencies = args
    before = keys.copy(), values.copy()
    per_block = data.draw(st.integers(1, 40))
    sinks = data.draw(st.sampled_from([None, np.linspace(-3, 20, len(q)).astype(np.float32)]))
    out = attend(q, k, v, keys, values, position, frequencies, window, per_block, sinks)
    expected, rotated = naive.attend_one(q, k, v, *before, position, frequencies, window, sinks)
    other_positions = np.arange(capacity) != position
    for array, old in zip((keys, values), before, strict=True):
        np.testing.assert_array_equal(array[:, other_positions], old[:, other_positions])
    np.testing.assert_array_equal(values[:, position], v.astype(kind))
    rounding = np.finfo(kind).eps if kind == np.float16 else 0  # the cache rounds to float16, the oracle does not
    largest = np.abs(k).max() * 2**0.5
    assert np.abs(keys[:, position] - rotated).max() <= (rounding + 10 * naive.EPSILON) * largest
    # the error of a score; a softmax weight is off by the same factor, an output by as much of its addends
    score = (
        (rounding + 10 * naive.EPSILON) * np.abs(q).max() * max(largest, np.abs(before[0]).max()) * (2 * pairs) ** 0.5
    )
    largest = max(np.abs(v).max(), np.abs(before[1]).max())
    assert np.abs(out - expected).max() <= (2 * score + 2 * rounding + naive.EPSILON) * largest


@KINDS
def test_nan_reaches_the_outputs_of_its_own_kv_head_only(kind):
    for argument in range(3):
        args = case(2, 2, 2, 8, 20, kind)
        args[argument][0, 3] = np.nan
        out = attend(*args[:5], 11, args[5])
        assert np.isnan(out[0]).any()
        assert np.isfinite(out[2:]).all()


@pytest.mark.parametrize("sinks", [np.ones(3, np.float32), np.ones(4, np.float64), np.ones((1, 4), np.float32)])
def test_sinks_of_another_shape_or_type_are_refused(sinks):
    args = case(2, 2, 2, 8, 20, np.float32)
    with pytest.raises(ValueError, match="sinks are"):
        attend(*args[:5], 11, args[5], sinks=sinks)


def test_positions_outside_the_window_and_after_the_token_are_never_read():
    q, k, v, keys, values, frequencies = case(3, 2, 2, 8, 20, np.float32)
    keys[:, :8] = values[:, :8] = np.nan
    keys[:, 12:] = values[:, 12:] = np.nan
    assert np.isfinite(attend(q, k, v, keys, values, 11, frequencies, 4)).all()


@KINDS
@pytest.mark.parametrize("window", [None, 30])
def test_each_sequence_of_a_batch_gets_the_same_bits_as_alone(kind, window):
    """For different lengths and capacities, on one thread and on all."""
    positions, capacities = [0, 299, 40, 7, 120, 1], [1, 300, 64, 8, 500, 2]
    cases = [case(n, 2, 4, 64, capacity, kind) for n, capacity in enumerate(capacities)]
    frequencies = cases[0][5]
    storage = [[bits(one[i].copy())[None] for one in cases] for i in (3, 4)]
    before, default_threads = to_pool(*storage, per_block=16), kernels.thread_count()
    alone = [attend(*one[:5], position, frequencies, window) for one, position in zip(cases, positions, strict=True)]
    q, k, v = (np.stack([one[i] for one in cases]) for i in range(3))
    try:
        for threads in (1, default_threads):
            kernels.set_threads(threads)
            pool, tables = before[0].copy(), before[1]
            together = kernels.attend_each(q, k, v, pool, 0, tables, positions, frequencies, window)
            np.testing.assert_array_equal(together, np.stack(alone))
            for one, table in zip(cases, tables, strict=True):
                for array, after in zip(one[3:5], from_pool(pool, table, one[3].shape[1]), strict=True):
                    np.testing.assert_array_equal(after[0], bits(array))  # written by `alone`
    finally:
        kernels.set_threads(default_threads)


def test_a_batch_of_no_sequences_gives_an_empty_output():
    none = np.empty((0, 4, 8), np.float32)
    pool = np.empty((1, 1, 2, 2, 16, 8), np.float32)
    assert kernels.attend_each(none, none[:, :2], none[:, :2], pool, 0, [], [], np.ones(4, np.float32)).shape == (
        0,
        4,
        8,
    )


def test_attention_refuses_arguments_of_the_wrong_shape_type_or_range():
    q, k, v, keys, values, frequencies = case(4, 2, 2, 8, 20, np.float32)
    pool, tables = to_pool([keys[None]], [values[None]], per_block=8)
    good = {"q": q[None], "k": k[None], "v": v[None], "pool": pool, "layer": 0, "tables": tables, "positions": [5]}
    good["frequencies"] = frequencies
    kernels.attend_each(**good)
    fixed = pool.copy()
    fixed.flags.writeable = False
    bad = {
        "q": [good["q"][:, :3], good["q"][..., :6], q, good["q"].astype(np.float64), np.concatenate([good["q"]] * 2)],
        "k": [good["k"][:, :1], good["k"][:, ::-1], good["k"].astype(np.float16), k],
        "v": [good["v"][:, :1]],
        "pool": [pool[0], pool[:, :, :1], pool[:, :, :, :1], pool[:, :, :, :, ::2], pool[..., :6], pool[:0]],
        "layer": [-1, 1],
        "tables": [[], tables * 2, [tables[0].astype(np.int32)], [tables[0][None]], [tables[0][:0]], [tables[0] + 9]],
        "frequencies": [frequencies[:3]],
        "positions": [[-1], [24], [1, 2]],
        "window": [0, -1],
    }
    bad["pool"] += [fixed, pool.astype(np.float64), pool.astype(np.float16)]
    bad["tables"] += [[tables[0][::2]], [np.array([-1, 0, 1])]]
    for name, wrong in bad.items():
        for value in wrong:
            with pytest.raises(ValueError):
                kernels.attend_each(**good | {name: value})


@njit
def round_trip(bits, values, back):
    for i in range(bits.size):
        values[i] = arithmetic.from_half(bits[i])
        back[i] = arithmetic.to_half(values[i])


@njit
def round_to_half(values, bits):
    for i in range(bits.size):
        bits[i] = arithmetic.to_half(values[i])


def test_every_float16_converts_to_float32_exactly_and_back():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values, back = np.empty(bits.size, np.float32), np.empty(bits.size, np.uint16)
    round_trip(bits, values, back)
    np.testing.assert_array_equal(values, bits.view(np.float16).astype(np.float32))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.isnan(back[~number].view(np.float16)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_float32_rounds_to_float16_as_numpy_does(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1 << 32, 4000, np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    bits = rng.integers(0, 0x7C00, 4000)
    low, high = ((bits + offset).astype(np.uint16).view(np.float16).astype(np.float64) for offset in (0, 1))
    ties = np.where(bits == 0x7BFF, 65520.0, (low + high) / 2)
    values = np.concatenate([values, low, ties, -ties, rng.normal(size=4000)]).astype(np.float32)
    bits = np.empty(values.size, np.uint16)
    round_to_half(values, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(bits[number], expected.view(np.uint16)[number])
    assert np.isnan(bits[~number].view(np.float16)).all()


def test_sequences_that_would_write_to_one_block_are_refused():
    """They may share a block that is only read."""
    cases = [case(seed, 2, 2, 8, 20, np.float32) for seed in (1, 2)]
    q, k, v = (np.stack([one[i] for one in cases]) for i in range(3))
    pool, tables = to_pool([one[3][None] for one in cases], [one[4][None] for one in cases], per_block=8)
    tables[1][0] = tables[0][0]
    kernels.attend_each(q, k, v, pool, 0, tables, [9, 11], cases[0][5])
    tables[1][1] = tables[0][1]
    with pytest.raises(ValueError, match="the same block"):
        kernels.attend_each(q, k, v, pool, 0, tables, [9, 11], cases[0][5])
