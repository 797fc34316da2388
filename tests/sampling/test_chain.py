"""Typical, XTC and log-probabilities, and the whole chain of sampling steps in its order."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings, strategies as st
from transformers import TypicalLogitsWarper

from fiddler.errors import RequestError
from fiddler.sampling.logprobs import largest, log_probs
from fiddler.sampling.sampler import Sampler, Sampling, top_k, typical, xtc

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
sensible = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(lambda v: np.array(v, np.float32))
with_ties = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40).map(
    lambda v: np.array(v, np.float32)
)
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def chances(values, temperature=1.0):
    weights = [math.exp((float(value) - max(map(float, values))) / temperature) for value in values]
    return [weight / math.fsum(weights) for weight in weights]


def naive_typical(logits, ids, p):
    chance = chances(logits[ids])
    entropy = -math.fsum(own * math.log(own) for own in chance if own)
    nearness = [abs(-math.log(own) - entropy) if own else math.inf for own in chance]
    order = sorted(range(len(ids)), key=lambda index: (nearness[index], index))
    chosen, reached = set(), 0.0
    for index in order:
        chosen.add(ids[index])
        reached += chance[index]
        if reached > p:
            break
    return [token for token in ids if token in chosen], np.cumsum([chance[index] for index in order]), sorted(nearness)


@PROPERTY
@given(st.one_of(sensible, with_ties), st.floats(0.01, 0.99))
def test_typical_selects_the_tokens_of_the_oracle_and_of_transformers(logits, p):
    ids = top_k(logits, 0)
    expected, reached, nearness = naive_typical(logits, ids.tolist(), p)
    assume(all(abs(sum_ - p) > 1e-9 for sum_ in reached))  # rounding must not decide
    assume(all(b - a > 1e-9 or logits.size == 1 for a, b in pairwise(nearness)))  # transformers takes all equals
    assert typical(logits, ids, p).tolist() == expected
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    theirs = TypicalLogitsWarper(p)(torch.zeros(1, 1, dtype=torch.int64), scores)[0]
    assert sorted(expected) == torch.isfinite(theirs).nonzero().flatten().tolist()


@PROPERTY
@given(st.one_of(sensible, with_ties), st.floats(0, 1))
def test_xtc_removes_all_probable_tokens_but_the_least_probable_of_them(logits, threshold):
    ids = top_k(logits, 0).tolist()
    chance = chances(logits[ids])
    assume(all(abs(own - threshold) > 1e-9 for own in chance))
    probable = [token for token, own in zip(ids, chance, strict=True) if own >= threshold]
    expected = [token for token in ids if token not in probable[:-1]]
    assert xtc(logits, np.array(ids), threshold).tolist() == expected


@PROPERTY
@given(st.one_of(sensible, with_ties), st.integers(0, 45), st.integers(0, 39))
@example(np.array([0, 1e-30, 5], np.float32), 3, 0)  # two logits that differ less than log-probabilities are exact
def test_log_probs_and_their_order_are_those_of_torch(logits, count, token):
    token %= logits.size
    ours = log_probs(logits, token, count)
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), 0)
    assert ours.token == token
    assert ours.logprob == pytest.approx(float(expected[token]), abs=1e-9)
    by_size = sorted(range(logits.size), key=lambda index: (-logits[index], index))
    assert [one for one, _ in ours.top] == by_size[:count]
    assert [value for _, value in ours.top] == pytest.approx([float(expected[one]) for one, _ in ours.top], abs=1e-9)


@pytest.mark.parametrize("count", [1, 40, 5000])
@pytest.mark.parametrize("values", [3, 1 << 20])
def test_the_largest_of_a_whole_vocabulary_are_the_first_of_all_in_order(count, values):
    logits = np.random.default_rng(count).integers(0, values, 50_257).astype(np.float32)
    logits[logits == 1] = -np.inf
    order = sorted(range(logits.size), key=lambda index: (-logits[index], index))
    assert largest(logits, count).tolist() == order[:count]


class Only:
    """A guide that allows some tokens only and records the chosen ones."""

    def __init__(self, *allowed):
        self.only, self.chosen = allowed, []

    finished = False

    def allowed(self):
        mask = np.zeros(4, bool)
        mask[list(self.only)] = True
        return mask

    def advance(self, token):
        self.chosen.append(token)


def test_log_probs_are_those_of_the_models_raw_logits():
    """Of the raw logits: before mask, bias, penalties, truncation and temperature."""
    logits = np.array([3, 2, 1, 0], np.float32)
    guide = Only(2, 3)
    sampler = Sampler(Sampling(0.0, repeat_penalty=2.0, logit_bias={2: -9.0}, n_probs=2), guide=guide)
    assert sampler(logits, [3]) == 3
    own = np.log(chances(logits))
    assert sampler.log_probs == [log_probs(logits, 3, 2)]
    assert sampler.log_probs[0].logprob == pytest.approx(own[3])
    assert sampler.log_probs[0].top == ((0, pytest.approx(own[0])), (1, pytest.approx(own[1])))
    assert guide.chosen == [3]
    assert not Sampler(Sampling(0.0)).log_probs


def test_a_constraints_mask_comes_first_and_outweighs_every_other_step():
    logits = np.array([9, 8, 7, -30], np.float32)
    for sampling in (Sampling(0.0), Sampling(1.0, top_k=1), Sampling(1.0, logit_bias={0: 100.0}), Sampling(5.0, **OFF)):
        for seed in range(20):
            settings_ = {**vars(sampling), "seed": seed}
            assert Sampler(Sampling(**settings_), guide=Only(3))(logits, [3]) == 3
    assert Sampler(Sampling(0.0), guide=Only(1, 3))(logits, []) == 1


def test_a_mask_that_leaves_no_token_and_dry_without_pieces_are_errors():
    with pytest.raises(RequestError, match="no token is left"):
        Sampler(Sampling(logit_bias={1: -math.inf}), guide=Only(1))(np.zeros(4, np.float32), [])
    with pytest.raises(RequestError, match="sequence breakers need"):
        Sampler(Sampling(dry_multiplier=1.0))


STEPS = ("bias", "penalties", "dry", "top_k", "typical", "top_p", "min_p", "xtc", "temperature")
"""llama.cpp's order; the oracle applies XTC whenever its probability is not 0."""


def step(name, logits, ids, recent, s):
    """The logits and the ids, largest logit first, after one step."""
    ids = sorted(ids, key=lambda token: (-logits[token], token))
    chance = dict(zip(ids, chances(logits[ids]), strict=True))
    if name == "bias":
        return logits + [s.logit_bias.get(token, 0.0) for token in range(len(logits))], ids
    if name == "penalties":
        counts = [recent.count(token) for token in range(len(logits))]
        less = [(v / s.repeat_penalty if v > 0 else v * s.repeat_penalty) - s.presence_penalty for v in logits]
        return np.where(counts, less, logits), ids
    if name == "dry":  # every case ends with a token that occurs once before, followed by token 0
        return logits - [s.dry_multiplier * (token == 0) for token in range(len(logits))], ids
    if name == "top_k":
        return logits, ids[: s.top_k or None]
    if name == "typical":
        return logits, naive_typical(logits, ids, s.typical_p)[0]
    if name == "top_p":
        reached = np.cumsum([chance[token] for token in ids])
        return logits, ids[: int((reached < s.top_p).sum()) + 1]
    if name == "min_p":
        return logits, [token for token in ids if chance[token] >= s.min_p * chance[ids[0]]]
    if name == "xtc":
        probable = [token for token in ids if s.xtc_probability and chance[token] >= s.xtc_threshold]
        return logits, [token for token in ids if token not in probable[:-1]]
    return logits / s.temperature, ids


def distribution(logits, recent, s, order=STEPS):
    logits, ids = np.array(logits, np.float64), list(range(len(logits)))
    for name in order:
        logits, ids = step(name, logits, ids, recent, s)
    return dict(zip(ids, chances(logits[ids]), strict=True))


def logs(*values):
    return [math.log(value) for value in values]


DRY = {"dry_multiplier": 3.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()}
XTC = {"xtc_probability": 1.0}
CASES = {  # two neighbours in the order, and a case in which they do not commute
    ("bias", "penalties"): ([2, 2, 1, 1], [0], {"logit_bias": {0: 2.0}, "repeat_penalty": 4.0}),
    ("penalties", "dry"): ([3, 0, 0, 0], [3, 0, 3], {**DRY, "dry_multiplier": 1.0, "repeat_penalty": 4.0}),
    ("dry", "top_k"): ([3, 2, 1, 0], [3, 0, 3], {**DRY, "top_k": 2}),
    ("top_k", "typical"): (logs(0.4, 0.3, 0.2, 0.1), [], {"top_k": 2, "typical_p": 0.3}),
    ("typical", "top_p"): (logs(0.45, 0.3, 0.15, 0.1), [], {"typical_p": 0.2, "top_p": 0.4}),
    ("min_p", "xtc"): (logs(0.5, 0.25, 0.15, 0.1), [], {**XTC, "min_p": 0.45, "xtc_threshold": 0.2}),
    ("xtc", "temperature"): (logs(0.8, 0.15, 0.04, 0.01), [], {**XTC, "temperature": 3.0, "xtc_threshold": 0.2}),
}
DRAWS, BOUND = 4000, 0.05  # a larger deviation has a probability of 2 exp(-2 * 4000 * 0.05^2) = 4e-9 (Hoeffding)


@pytest.mark.parametrize("neighbours", CASES, ids=" before ".join)
def test_drawn_frequencies_follow_the_order_of_the_steps(neighbours):
    first, second = neighbours
    logits, recent, options = CASES[neighbours]
    sampling = Sampling(**{"temperature": 1.0, **OFF, **options, "seed": 20261122})
    right = distribution(logits, recent, sampling)
    swapped = [{first: second, second: first}.get(name, name) for name in STEPS]
    wrong = distribution(logits, recent, sampling, swapped)
    assert max(abs(right.get(token, 0) - wrong.get(token, 0)) for token in range(4)) > 2 * BOUND
    sampler = Sampler(sampling)
    drawn = Counter(sampler(np.array(logits, np.float32), recent) for _ in range(DRAWS))
    assert drawn.keys() <= right.keys()
    for token, chance in right.items():
        assert abs(drawn[token] / DRAWS - chance) < BOUND


def test_xtc_is_applied_with_its_probability():
    logits = np.array(logs(0.5, 0.4, 0.1), np.float32)
    sampler = Sampler(Sampling(1.0, **OFF, seed=3, xtc_probability=0.25, xtc_threshold=0.2))
    drawn = Counter(sampler(logits, []) for _ in range(DRAWS))
    assert abs(drawn[0] / DRAWS - 0.75 * 0.5) < BOUND  # else XTC removes token 0


def test_greedy_sampling_applies_biases_and_penalties_but_neither_typical_nor_xtc():
    logits = np.array([4, 3, 2, 1], np.float32)
    cases = [
        ({"logit_bias": {3: 10.0}}, [], 3),
        ({"presence_penalty": 1.5}, [0], 1),
        ({"frequency_penalty": 1.5}, [0, 0, 1], 2),
        ({**DRY, "dry_multiplier": 1.5}, [3, 0, 3], 1),
        ({"typical_p": 0.1, "xtc_probability": 1.0, "xtc_threshold": 0.0}, [], 0),
    ]
    for options, recent, expected in cases:
        assert Sampler(Sampling(0.0, **options))(logits, recent) == expected


def test_dry_finds_sequence_breakers_in_the_pieces_of_the_tokenizer():
    logits = np.array([4, 3, 2, 1], np.float32)
    sampling = Sampling(0.0, dry_multiplier=9.0, dry_allowed_length=1)
    assert Sampler(sampling, [b"a", b"b", b"c", b"d"])(logits, [3, 0, 3]) == 1
    assert Sampler(sampling, [b"a", b"b", b"c", b":"])(logits, [3, 0, 3]) == 0  # a colon ends every run
    assert Sampler(sampling, [b"a:", b"b", b"c", b"d"])(logits, [3, 0, 3]) == 0


@pytest.mark.parametrize(
    "name, bad",
    [
        ("typical_p", [-0.1, 1.1, math.nan, None]),
        ("presence_penalty", [math.inf, math.nan, "1", 1e7]),
        ("frequency_penalty", [-math.inf, None, -1e7]),
        ("dry_multiplier", [-0.1, math.inf, None]),
        ("dry_base", [0.9, math.inf, None]),
        ("dry_allowed_length", [-1, 2.0, None]),
        ("dry_penalty_last_n", [-2, 64.0]),
        ("dry_sequence_breakers", ["\n", [""], [b":"], None, 3]),
        ("xtc_probability", [-0.1, 1.1, math.nan]),
        ("xtc_threshold", [-0.1, 1.1, math.nan]),
        ("logit_bias", [{-1: 1.0}, {"1": 1.0}, {1: math.inf}, {1: math.nan}, {1: None}, [(1, 1.0)]]),
        ("n_probs", [-1, 1.0, None]),
    ],
)
def test_values_out_of_range_are_refused(name, bad):
    for value in bad:
        with pytest.raises(RequestError, match=rf"^{name} is .*; it must ") as refused:
            Sampling(**{name: value})
        assert "\n" not in str(refused.value)


def test_a_sampling_copies_its_mutable_arguments():
    bias, breakers = {1: 2.0}, [":"]
    sampling = Sampling(logit_bias=bias, dry_sequence_breakers=breakers)
    bias[2], breakers[0] = 1.0, "x"
    assert sampling == Sampling(logit_bias={1: 2.0}, dry_sequence_breakers=(":",))
    assert hash(sampling) == hash(Sampling(dry_sequence_breakers=(":",)))


def test_defaults_are_llama_cpps():
    """`common_params_sampling` in its common.h: everything new is off."""
    assert Sampling() == Sampling(
        typical_p=1.0,
        presence_penalty=0.0,
        frequency_penalty=0.0,
        dry_multiplier=0.0,
        dry_base=1.75,
        dry_allowed_length=2,
        dry_penalty_last_n=64,
        dry_sequence_breakers=("\n", ":", '"', "*"),
        xtc_probability=0.0,
        xtc_threshold=0.1,
        logit_bias={},
        n_probs=0,
    )
