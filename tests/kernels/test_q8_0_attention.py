"""Decode attention over keys and values in blocks of Q8_0, against the `gguf` package's numpy quantiser."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from fiddler import kernels
from oracles import naive
from oracles.paged import from_pool, to_pool

Q8_0 = GGMLQuantizationType.Q8_0


def rounded(rows):
    """What gguf makes of rows, as bytes and as numbers."""
    flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]), np.float32)
    stored = gguf.quantize(flat, Q8_0)
    return stored.reshape(*rows.shape[:-1], -1), gguf.dequantize(stored, Q8_0).reshape(rows.shape)


def softmax_sum(q, keys, values, sinks):
    """float64 attention of rotated queries [H, d] to keys and values [G, S, d]."""
    out = np.empty(q.shape)
    for h, row in enumerate(q.astype(np.float64)):
        g = h // (len(q) // len(keys))
        scores = keys[g].astype(np.float64) @ row / row.size**0.5
        scores = scores if sinks is None else np.append(scores, sinks[h])
        weights = np.exp(scores - scores.max())
        out[h] = (weights / weights.sum())[: keys.shape[1]] @ values[g]
    return out


def rotated(rows, position, frequencies):
    turns = np.exp(1j * (np.float32(position) * frequencies).astype(np.float64))
    pairs = (rows[:, 0::2] + 1j * rows[:, 1::2].astype(np.float64)) * turns
    return np.stack([pairs.real, pairs.imag], -1).reshape(rows.shape)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sinks", [None, np.linspace(-3, 5, 8).astype(np.float32)])
@pytest.mark.parametrize("head_dim", [32, 96, 128])
def test_attention_is_that_to_keys_and_values_that_gguf_rounds(head_dim, window, sinks):
    rng, groups, capacity, position = np.random.default_rng(head_dim), 2, 77, 63
    q, k, v = (rng.normal(size=(n, head_dim)).astype(np.float32) for n in (8, groups, groups))
    keys, values = (rng.normal(size=(groups, capacity, head_dim)) for _ in range(2))
    frequencies = (1 / 10000 ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    (key_bytes, keys), (value_bytes, values) = rounded(keys), rounded(values)
    rest = [position], frequencies, window, sinks
    wide, (table,) = to_pool([keys[None]], [values[None]], 8)
    kernels.attend_each(q[None], k[None], v[None], wide, 0, [table], *rest)
    new = from_pool(wide, table, capacity)[0][0, :, position]  # the key as the kernel rotates it
    pool, (table,) = to_pool([key_bytes[None]], [value_bytes[None]], 8)
    out = kernels.attend_each(q[None], k[None], v[None], pool, 0, [table], *rest)[0]
    stored_keys, stored_values = (array[0] for array in from_pool(pool, table, capacity))
    for before, after, row in ((key_bytes, stored_keys, new), (value_bytes, stored_values, v)):
        np.testing.assert_array_equal(after[:, position], rounded(row)[0])
        others = np.arange(capacity) != position
        np.testing.assert_array_equal(after[:, others], before[:, others])
    keys[:, position], values[:, position] = rounded(new)[1], rounded(v)[1]
    oldest = 0 if window is None else position + 1 - window
    seen = slice(oldest, position + 1)
    expected = softmax_sum(rotated(q, position, frequencies), keys[:, seen], values[:, seen], sinks)
    assert np.abs(out - expected).max() < 1e-5
    exact, _ = naive.attend_one(q, k, v, keys, values, position, frequencies, window, sinks)
    assert np.abs(exact - expected).max() < 0.02  # rounding one position of the oracle itself


def test_rows_that_gguf_rounds_in_a_particular_way_are_written_so():
    """Ties, zeros, scales that are subnormal or too large for float16; position 0 is not rotated."""
    rows = np.zeros((6, 1, 64), np.float32)
    rows[0, 0, :4] = 127, 0.5, -1.5, 2.5
    rows[1, 0, 32:] = 1e-6 * np.arange(32)
    rows[2, 0] = np.linspace(-1e-9, 1e-9, 64)
    rows[3, 0] = np.linspace(-3e8, 1, 64)
    rows[4, 0, 5] = 1e-36
    rows[5, 0] = np.random.default_rng(0).normal(size=64)
    pool = np.zeros((6, 1, 2, 1, 4, 68), np.uint8)
    tables = [np.array([n]) for n in range(6)]
    with np.errstate(over="ignore", invalid="ignore"):
        kernels.attend_each(rows, rows, rows[::-1].copy(), pool, 0, tables, [0] * 6, np.ones(32, np.float32))
        expected = rounded(rows[:, 0])[0]
    np.testing.assert_array_equal(pool[:, 0, 0, 0, 0], expected)
    np.testing.assert_array_equal(pool[:, 0, 1, 0, 0], expected[::-1])


def test_a_number_that_is_none_reaches_the_outputs_of_its_own_head_only():
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(1, n, 32)).astype(np.float32) for n in (4, 2, 2))
    v[0, 0, 3] = np.nan
    pool = np.zeros((1, 1, 2, 2, 8, 34), np.uint8)
    out = kernels.attend_each(q, k, v, pool, 0, [np.zeros(1, np.int64)], [5], np.ones(16, np.float32))[0]
    assert np.isnan(out[:2]).all()
    assert np.isfinite(out[2:]).all()


def test_a_pool_of_no_whole_blocks_is_refused():
    q = np.zeros((1, 2, 48), np.float32)
    arguments = q, q, q, np.zeros((1, 1, 2, 2, 8, 51), np.uint8), 0, [np.zeros(1, np.int64)], [0]
    with pytest.raises(ValueError, match="no multiple of 32"):
        kernels.attend_each(*arguments, np.ones(24, np.float32))
    narrow = np.zeros((1, 2, 32), np.float32)
    with pytest.raises(ValueError, match="the pool is"):
        kernels.attend_each(narrow, narrow, narrow, *arguments[3:], np.ones(16, np.float32))
