"""The norm and the choice of experts against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from oracles import naive

SIZES = {"tokens": st.integers(0, 20), "width": st.integers(1, 200), "seed": st.integers(0, 2**32 - 1)}


@settings(max_examples=40, deadline=None)
@given(**SIZES, epsilon=st.sampled_from([1e-6, 1e-5, 0.1]), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_norm_is_the_naive_one(tokens, width, seed, epsilon, scale):
    rng = np.random.default_rng(seed)
    x, weight = (scale * rng.normal(size=(tokens, width))).astype(np.float32), rng.normal(size=width).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + epsilon) * weight
    np.testing.assert_allclose(kernels.rms_norm(x, weight, epsilon), expected, rtol=naive.EPSILON, atol=0)


@settings(max_examples=60, deadline=None)
@given(**SIZES, experts=st.integers(1, 12), data=st.data())
def test_the_most_probable_experts_are_chosen(tokens, width, seed, experts, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, experts))
    x, weight = (rng.normal(size=(n, width)).astype(np.float32) for n in (tokens, experts))
    ids, shares = kernels.route(x, weight, k)
    scores = x.astype(np.float64) @ weight.T
    error = 2 * naive.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weight.T)).max(axis=1, initial=0)
    chosen = np.take_along_axis(scores, ids, 1)
    assert (chosen >= np.sort(scores, 1)[:, ::-1][:, :k] - error[:, None]).all()
    assert all(len(set(row)) == k for row in ids.tolist())
    expected = np.exp(chosen - chosen.max(axis=1, keepdims=True, initial=-np.inf))
    expected /= expected.sum(axis=1, keepdims=True)
    assert (np.abs(shares - expected) <= (2 * error[:, None] + naive.EPSILON) * expected + 1e-37).all()


def test_equal_experts_are_taken_in_order():
    ids, shares = kernels.route(np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(shares, 1 / 3, rtol=1e-6)


def test_what_is_no_number_stays_none():
    x = np.full((1, 3), np.nan, np.float32)
    ids, shares = kernels.route(x, np.ones((4, 3), np.float32), 2)
    assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist())
    assert ((ids >= 0) & (ids < 4)).all()
    assert np.isnan(shares).all()
    assert np.isnan(kernels.rms_norm(x, np.ones(3, np.float32), 1e-5)).all()


def test_bad_arguments_stop_at_the_door():
    x, weight = np.ones((2, 6), np.float32), np.ones((4, 6), np.float32)
    for bad in ((x[0], weight[0]), (x, weight), (x, weight[0, :5]), (x.astype(np.float64), weight[0])):
        with pytest.raises(ValueError):
            kernels.rms_norm(*bad, 1e-5)
    for wrong in ((x[0], weight, 2), (x, weight[0], 1), (x, weight[:, :5], 2), (x, weight, 0), (x, weight, 5)):
        with pytest.raises(ValueError):
            kernels.route(*wrong)
    with pytest.raises(ValueError):
        kernels.route(x.astype(np.float64), weight, 2)
