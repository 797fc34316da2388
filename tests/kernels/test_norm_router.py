"""RMS norm and the router against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from fiddler import kernels
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights
from fiddler.models.router import route as torch_route
from oracles import naive

SIZES = {"tokens": st.integers(0, 20), "width": st.integers(1, 200), "seed": st.integers(0, 2**32 - 1)}


@settings(max_examples=40, deadline=None)
@given(**SIZES, epsilon=st.sampled_from([1e-6, 1e-5, 0.1]), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_rms_norm_matches_float64(tokens, width, seed, epsilon, scale):
    rng = np.random.default_rng(seed)
    x, weight = (scale * rng.normal(size=(tokens, width))).astype(np.float32), rng.normal(size=width).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + epsilon) * weight
    np.testing.assert_allclose(kernels.rms_norm(x, weight, epsilon), expected, rtol=naive.EPSILON, atol=0)


@settings(max_examples=60, deadline=None)
@given(**SIZES, experts=st.integers(1, 12), data=st.data())
def test_the_router_chooses_the_most_probable_experts_and_weighs_them_by_softmax(tokens, width, seed, experts, data):
    rng = np.random.default_rng(seed)
    k = data.draw(st.integers(1, experts))
    x, weight = (rng.normal(size=(n, width)).astype(np.float32) for n in (tokens, experts))
    expert_ids, routing_weights = kernels.route(x, weight, k)
    scores = x.astype(np.float64) @ weight.T
    error = 2 * naive.EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weight.T)).max(axis=1, initial=0)
    chosen = np.take_along_axis(scores, expert_ids, 1)
    assert (chosen >= np.sort(scores, 1)[:, ::-1][:, :k] - error[:, None]).all()
    assert all(len(set(row)) == k for row in expert_ids.tolist())
    expected = np.exp(chosen - chosen.max(axis=1, keepdims=True, initial=-np.inf))
    expected /= expected.sum(axis=1, keepdims=True)
    assert (np.abs(routing_weights - expected) <= (2 * error[:, None] + naive.EPSILON) * expected + 1e-37).all()


def test_experts_of_equal_score_are_chosen_in_order():
    expert_ids, routing_weights = kernels.route(np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), 3)
    assert expert_ids.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(routing_weights, 1 / 3, rtol=1e-6)


def test_nan_activations_give_nan_weights_and_valid_distinct_experts():
    x = np.full((1, 3), np.nan, np.float32)
    expert_ids, routing_weights = kernels.route(x, np.ones((4, 3), np.float32), 2)
    assert sorted(set(expert_ids[0].tolist())) == sorted(expert_ids[0].tolist())
    assert ((expert_ids >= 0) & (expert_ids < 4)).all()
    assert np.isnan(routing_weights).all()
    assert np.isnan(kernels.rms_norm(x, np.ones(3, np.float32), 1e-5)).all()


def test_norm_and_router_refuse_arguments_of_the_wrong_shape_type_or_range():
    x, weight = np.ones((2, 6), np.float32), np.ones((4, 6), np.float32)
    for bad in ((x[0], weight[0]), (x, weight), (x, weight[0, :5]), (x.astype(np.float64), weight[0])):
        with pytest.raises(ValueError):
            kernels.rms_norm(*bad, 1e-5)
    for wrong in ((x[0], weight, 2), (x, weight[0], 1), (x, weight[:, :5], 2), (x, weight, 0), (x, weight, 5)):
        with pytest.raises(ValueError):
            kernels.route(*wrong)
    with pytest.raises(ValueError):
        kernels.route(x.astype(np.float64), weight, 2)


@pytest.mark.parametrize("scoring", Scoring)
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (12, 5)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_every_rule_of_the_router_is_the_one_of_torch(scoring, renormalise, groups, biased, shifted):
    rng = np.random.default_rng(5)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((30, 16), (12, 16)))
    bias = rng.normal(size=12).astype(np.float32) if biased else None
    shift = rng.normal(size=12).astype(np.float32) if shifted else None
    rule = RouterRule(scoring, renormalise, 1.5, *groups)
    as_kernel = kernels.Routing(scoring is Scoring.SIGMOID, renormalise, 1.5, *groups)
    ones = torch.ones(16)
    biases = (None if each is None else torch.from_numpy(each) for each in (bias, shift))
    weights = RouterWeights(ones, torch.from_numpy(weight), *biases)
    h = torch.from_numpy(x)
    normed, expected_ids, expected = torch_route(h, 0.0, weights, rule, 4)
    expert_ids, routing_weights = kernels.route(normed.numpy(), weight, 4, as_kernel, bias, shift)
    np.testing.assert_array_equal(expert_ids, expected_ids.numpy())
    np.testing.assert_allclose(routing_weights, expected.numpy(), rtol=1e-5)
