"""Choosing a token: against transformers, against slow obvious oracles, and by counting drawn tokens."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from fiddler.errors import RequestError
from fiddler.sampling.penalties import penalize_repeats
from fiddler.sampling.sampler import Sampler, Sampling, min_p, pick, top_k, top_p

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
LARGEST = float(np.finfo(np.float32).max)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

sensible = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)
with_ties = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40)
extreme = st.lists(
    st.one_of(st.floats(-LARGEST, LARGEST, width=32), st.just(-math.inf), st.sampled_from([LARGEST, -LARGEST, 1e-45])),
    min_size=1,
    max_size=20,
).filter(lambda values: max(values) > -math.inf)
any_logits = st.one_of(sensible, with_ties, extreme).map(lambda values: np.array(values, np.float32))
tame_logits = st.one_of(sensible, with_ties).map(lambda values: np.array(values, np.float32))


def by_size(logits):
    return sorted(range(len(logits)), key=lambda index: (-float(logits[index]), index))


def chances(values, temperature=1.0):
    weights = [math.exp((float(value) - max(map(float, values))) / temperature) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def naive_top_p(logits, ids, p):
    selected, reached = [], 0.0
    for index, chance in zip(ids, chances(logits[ids]), strict=True):
        selected.append(index)
        reached += chance
        if reached >= p:
            break
    return selected


def naive_min_p(logits, ids, p):
    chance = chances(logits[ids])
    return [index for index, own in zip(ids, chance, strict=True) if own >= p * max(chance)]


def not_on_an_edge(logits, ids, p):
    """Assume no sum of probabilities, and no ratio of two, so close to p that rounding decides."""
    chance = chances(logits[ids])
    assume(all(abs(reached - p) > 1e-9 for reached in np.cumsum(chance)))
    assume(all(abs(own / chance[0] - p) > 1e-6 for own in chance))


def survivors(warper, logits):
    """The logits that one of transformers' warpers leaves, largest first; float64, so that both round alike."""
    scores = warper(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(logits.astype(np.float64))[None])[0]
    return sorted(scores[scores > -math.inf].tolist(), reverse=True)


@PROPERTY
@given(any_logits, st.integers(-2, 45))
def test_top_k_is_the_first_k_of_a_full_sort(logits, k):
    assert top_k(logits, k).tolist() == by_size(logits)[: k if k > 0 else None]


@PROPERTY
@given(tame_logits, st.integers(1, 45))
def test_top_k_selects_the_tokens_of_transformers(logits, k):
    theirs = survivors(TopKLogitsWarper(k), logits)  # takes all that equal the last
    ours = logits[top_k(logits, k)].tolist()
    assert ours == theirs[: len(ours)]
    assert len(ours) == min(k, logits.size)


@PROPERTY
@given(tame_logits, st.floats(0, 1))
def test_top_p_selects_the_tokens_of_the_oracle_and_of_transformers(logits, p):
    ids = np.array(by_size(logits))
    not_on_an_edge(logits, ids, p)
    selected = top_p(logits, ids, p)
    assert selected.tolist() == naive_top_p(logits, ids, p)
    assert logits[selected].tolist() == survivors(TopPLogitsWarper(p), logits)


@PROPERTY
@given(tame_logits, st.floats(0, 1))
def test_min_p_selects_the_tokens_of_the_oracle_and_of_transformers(logits, p):
    ids = np.array(by_size(logits))
    not_on_an_edge(logits, ids, p)
    selected = min_p(logits, ids, p)
    assert selected.tolist() == naive_min_p(logits, ids, p)
    assert logits[selected].tolist() == survivors(MinPLogitsWarper(p), logits)


@PROPERTY
@given(tame_logits, st.lists(st.integers(0, 39), max_size=30), st.floats(0.1, 10))
def test_the_repeat_penalty_is_that_of_transformers(logits, recent, penalty):
    recent = [token for token in recent if token < logits.size]
    before = logits.copy()
    ours = penalize_repeats(logits, recent, penalty)
    assert np.array_equal(logits, before)
    if not recent:
        assert np.array_equal(ours, logits)
        return
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([recent]), scores.clone())[0]
    assert np.array_equal(ours, theirs.numpy())


@pytest.mark.parametrize(
    "logits, k, p, least, expected",
    [
        ([1, 1, 1, 1], 2, 1.0, 0.0, [0, 1]),  # the lowest ids among equals
        ([0, 5, 5, 0], 3, 1.0, 0.0, [1, 2, 0]),
        ([0, 0], 0, 0.5, 0.0, [0]),  # one of two equals reaches exactly a half
        ([0, 0], 0, 0.51, 0.0, [0, 1]),
        ([0, 0, 0, 0], 0, 0.75, 0.0, [0, 1, 2]),
        ([3, 2, 1], 0, 0.0, 0.0, [0]),  # at least one
        ([3, 2, 1], 0, 1.0, 1.0, [0]),
        ([3, 3, 1], 0, 1.0, 1.0, [0, 1]),  # as probable as the first
        ([-math.inf, 7, -math.inf], 3, 0.95, 0.05, [1]),  # one-hot
        ([LARGEST, LARGEST, -LARGEST], 2, 0.9, 0.05, [0, 1]),
        ([-LARGEST, -math.inf], 0, 0.9, 0.05, [0]),
        ([1e-45, 0], 1, 1.0, 0.0, [0]),  # the smallest float32 is larger than none
    ],
)
def test_tokens_that_top_k_top_p_and_min_p_select_by_hand(logits, k, p, least, expected):
    logits = np.array(logits, np.float32)
    ids = min_p(logits, top_p(logits, top_k(logits, k), p), least)
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    "weights, uniform, expected",
    [
        ([1, 1, 2], 0.0, 0),
        ([1, 1, 2], 0.2499, 0),
        ([1, 1, 2], 0.25, 1),
        ([1, 1, 2], 0.5, 2),
        ([1, 1, 2], 1 - 2**-53, 2),
        ([0, 1, 0], 0.0, 1),  # a weight of 0 is never picked, neither first nor last
        ([0, 1, 0], 1 - 2**-53, 1),
        ([0.1] * 10 + [0], 1 - 2**-53, 9),  # the sum is a little less than 1
        ([1, 2**-53, 0], 1 - 2**-53, 0),  # too small to count beside the first
        ([3.0], 0.7, 0),
    ],
)
def test_pick_finds_the_token_whose_cumulative_weight_passes_the_uniform_number(weights, uniform, expected):
    assert pick(np.array(weights, np.float64), uniform) == expected


@PROPERTY
@given(any_logits, st.sampled_from([0.0, 5e-324, 1e-300, 0.3, 1.0, 1e300]), st.sampled_from([1e-6, 0.5, 1.0, 2.0, 1e6]))
def test_for_any_logits_a_possible_token_is_chosen(logits, temperature, penalty):
    recent = list(range(0, logits.size, 2))
    for settings_ in (OFF, {}, {"top_k": 1, "top_p": 0.0, "min_p": 1.0}):
        sampler = Sampler(Sampling(temperature, **settings_, repeat_penalty=penalty, repeat_last_n=-1, seed=1))
        for _ in range(3):
            token = sampler(logits, recent)
            assert type(token) is int
            assert logits[token] > -math.inf


@PROPERTY
@given(any_logits)
def test_temperatures_of_0_and_close_to_0_choose_a_largest_logit(logits):
    assert Sampler(Sampling(0.0))(logits, []) == by_size(logits)[0]
    largest = np.flatnonzero(logits == logits.max())
    assert Sampler(Sampling(1e-300, **OFF, seed=3))(logits, []) in largest


def test_greedy_sampling_takes_the_lowest_id_of_equals_and_applies_the_repeat_penalty():
    logits = np.array([1, 4, 4, 3], np.float32)
    assert Sampler(Sampling(0.0))(logits, [1]) == 1
    assert Sampler(Sampling(0.0, repeat_penalty=1.1))(logits, [1]) == 2
    assert Sampler(Sampling(0.0, repeat_penalty=2.0))(logits, [1, 2]) == 3
    assert Sampler(Sampling(0.0, repeat_penalty=0.5))(logits, [0, 3]) == 3  # below 1 repeating is rewarded


@pytest.mark.parametrize("last, expected", [(0, 0), (1, 0), (2, 1), (3, 2), (9, 2), (-1, 2)])
def test_the_repeat_penalty_applies_to_the_last_tokens_only(last, expected):
    logits = np.array([9, 8, 7, 6], np.float32)
    sampler = Sampler(Sampling(0.0, repeat_penalty=10.0, repeat_last_n=last))
    assert sampler(logits, [1, 0, 3]) == expected


STEPS = ("penalty", "top_k", "top_p", "min_p", "temperature")
"""llama.cpp's order."""


def distribution(logits, recent, s, order=STEPS):
    """Each token's probability, the steps taken in `order`."""
    logits, ids, temperature = np.array(logits, np.float64), list(range(len(logits))), 1.0
    for step in order:
        scaled = logits / temperature
        ids.sort(key=lambda index: (-scaled[index], index))
        if step == "penalty":
            for token in set(recent[-s.repeat_last_n :]):
                logits[token] *= s.repeat_penalty if logits[token] < 0 else 1 / s.repeat_penalty
        elif step == "top_k":
            ids = ids[: s.top_k] if s.top_k > 0 else ids
        elif step == "top_p":
            ids = naive_top_p(scaled, ids, s.top_p)
        elif step == "min_p":
            ids = naive_min_p(scaled, ids, s.min_p)
        else:
            temperature = s.temperature
    return dict(zip(ids, chances(logits[ids], temperature), strict=True))


LOG = math.log
CASES = {  # two neighbours in the order, and a case in which they do not commute
    ("penalty", "top_k"): ([3.0, 2.9, 2.0, 1.9], [0], Sampling(1.0, 2, 1.0, 0.0, 2.0)),
    ("top_k", "top_p"): ([LOG(0.4), LOG(0.3), LOG(0.2), LOG(0.1)], [], Sampling(1.0, 2, 0.5, 0.0)),
    ("top_p", "min_p"): ([LOG(0.5), LOG(0.3), LOG(0.12), LOG(0.08)], [], Sampling(1.0, 0, 0.6, 0.3)),
    ("min_p", "temperature"): ([LOG(0.5), LOG(0.2), LOG(0.2), LOG(0.1)], [], Sampling(2.0, 0, 1.0, 0.5)),
    ("top_p", "temperature"): ([LOG(0.7), LOG(0.2), LOG(0.06), LOG(0.04)], [], Sampling(3.0, 0, 0.8, 0.0)),
}
DRAWS, BOUND = 10_000, 0.03  # a larger deviation has a probability of 2 exp(-2 * 10000 * 0.03^2) = 3e-8 (Hoeffding)


def assert_drawn_as_expected(logits, recent, sampling):
    sampler = Sampler(Sampling(**{**vars(sampling), "seed": 20261122}))
    drawn = Counter(sampler(np.array(logits, np.float32), recent) for _ in range(DRAWS))
    expected = distribution(logits, recent, sampling)
    assert drawn.keys() <= expected.keys()
    for token, chance in expected.items():
        assert abs(drawn[token] / DRAWS - chance) < BOUND


@pytest.mark.parametrize("neighbours", CASES, ids=" before ".join)
def test_drawn_frequencies_follow_the_order_of_the_steps(neighbours):
    first, second = neighbours
    logits, recent, sampling = CASES[neighbours]
    right = distribution(logits, recent, sampling)
    swapped = [{first: second, second: first}.get(step, step) for step in STEPS]
    wrong = distribution(logits, recent, sampling, swapped)
    assert max(abs(right.get(token, 0) - wrong.get(token, 0)) for token in range(4)) > 2 * BOUND
    assert_drawn_as_expected(logits, recent, sampling)


def test_all_sampling_steps_together_draw_from_the_oracles_distribution():
    logits = [-1.0, 1.4, 0.5, -2.0, 1.0, 0.9, 0.1, -0.3]
    assert_drawn_as_expected(logits, [4, 7, 0, 1], Sampling(0.6, 6, 0.9, 0.2, 1.5, repeat_last_n=3))


def test_tokens_of_a_large_vocabulary_are_drawn_by_their_softmax():
    logits = np.random.default_rng(5).normal(0, 2, 500).astype(np.float32)
    sampler = Sampler(Sampling(1.0, **OFF, seed=11))
    drawn = np.bincount([sampler(logits, []) for _ in range(DRAWS)], minlength=logits.size)
    expected = np.array(chances(logits)) * DRAWS
    often = expected >= 5  # the others together are one more cell of Pearson's statistic
    observed = np.append(drawn[often], drawn[~often].sum())
    expected_cells = np.append(expected[often], expected[~often].sum())
    freedom = observed.size - 1
    statistic = ((observed - expected_cells) ** 2 / expected_cells).sum()
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)  # chi-squared: mean and variance, five deviations


def test_a_seed_repeats_its_draws_and_no_seed_does_not():
    logits = np.zeros(1000, np.float32)
    runs = [
        [sampler(logits, []) for _ in range(20)]
        for sampler in (Sampler(Sampling(1.0, **OFF, seed=seed)) for seed in (7, 7, 8, None, None))
    ]
    assert runs[0] == runs[1]
    assert all(one != another for one, another in pairwise(runs[1:]))


@pytest.mark.parametrize(
    "name, bad",
    [
        ("temperature", [-0.1, math.nan, math.inf, -math.inf, "0.8", None, 1j]),
        ("top_k", [math.nan, 40.0, 0.5, math.inf, "40", None]),
        ("top_p", [-0.1, 1.1, math.nan, math.inf, "1", None]),
        ("min_p", [-0.1, 1.1, math.nan, math.inf, "1", None]),
        ("repeat_penalty", [0.0, -1.0, math.nan, math.inf, 1e7, 1e-7, "1", None]),
        ("repeat_last_n", [-2, math.nan, 64.0, "64", None]),
        ("seed", [-1, 2**64, 1.0, math.nan, "1"]),
    ],
)
def test_values_out_of_range_are_refused(name, bad):
    for value in bad:
        with pytest.raises(RequestError, match=rf"^{name} is .*; it must "):
            Sampling(**{name: value})


@pytest.mark.parametrize(
    "name, good",
    [
        ("temperature", [0, 0.0, -0.0, 5e-324, 1e308, np.float32(0.7)]),
        ("top_k", [-1, 0, 1, 10**30, np.int64(3), -(10**400)]),
        ("top_p", [0, 1, 0.5]),
        ("min_p", [0, 1, 0.5]),
        ("repeat_penalty", [1e-6, 1, 1e6]),
        ("repeat_last_n", [-1, 0, 10**400]),
        ("seed", [None, 0, 2**64 - 1]),
    ],
)
def test_values_in_range_are_accepted(name, good):
    logits = np.array([0.5, 2.0, 1.0], np.float32)
    for value in good:
        assert Sampler(Sampling(**{name: value}))(logits, [0, 1, 2]) in (0, 1, 2)


def test_defaults_are_llama_cpps():
    assert Sampling() == Sampling(0.8, 40, 0.95, 0.05, 1.0, 64, None)
