"""Biases, penalties and DRY against transformers, and against slow obvious oracles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import SequenceBiasLogitsProcessor

from fiddler.sampling.penalties import add_bias, lately, penalize_repeats, penalize_runs, since_breaker

PROPERTY = settings(deadline=None, max_examples=200, derandomize=True)
LARGEST = float(np.finfo(np.float32).max)
VOCABULARY = 6
PIECES = [b"a", b"b", b"ab", b":", b"a:b", b""]

logits = st.lists(st.floats(-30, 30, width=32), min_size=VOCABULARY, max_size=VOCABULARY).map(
    lambda values: np.array(values, np.float32)
)
tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
runs = st.tuples(tokens, st.integers(0, 12), st.integers(0, 3)).map(lambda t: t[0] + t[0][len(t[0]) - t[1] :] * t[2])
breakers = st.lists(st.sampled_from([b":", b"b", b"ba", b"b:a", b"zz"]), max_size=2)


@PROPERTY
@given(logits, st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-10, 10), min_size=1))
def test_biases_are_added_as_in_transformers(logits, bias):
    before = logits.copy()
    theirs = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = theirs(torch.zeros(1, 1, dtype=torch.int64), torch.from_numpy(logits)[None])[0]
    np.testing.assert_allclose(add_bias(logits, bias), expected, rtol=1e-5, atol=1e-5)  # theirs is float32
    assert np.array_equal(logits, before)


def test_a_bias_of_minus_infinity_bans_a_token():
    banned = add_bias(np.array([1, 2, 3], np.float32), {2: -math.inf, 0: 5.0})
    assert banned.tolist() == [6, 2, -math.inf]


@PROPERTY
@given(logits, tokens, st.floats(0.1, 10), st.floats(-2, 2), st.floats(-2, 2))
def test_repeat_presence_and_frequency_penalties_follow_their_formulas(logits, recent, repeat, presence, frequency):
    expected = logits.astype(np.float64)
    for token in set(recent):
        expected[token] *= repeat if expected[token] < 0 else 1 / repeat
        expected[token] -= presence
        expected[token] -= frequency * recent.count(token)
    actual = penalize_repeats(logits, recent, repeat, presence, frequency)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count, expected", [(0, []), (2, [8, 9]), (3, [7, 8, 9]), (9, [7, 8, 9]), (-1, [7, 8, 9])])
def test_lately_returns_the_last_tokens_or_for_minus_1_all(count, expected):
    assert lately([7, 8, 9], count) == expected


def naive_since_breaker(recent, breakers):
    text = b"".join(PIECES[token] for token in recent)
    ends = [position + len(b) for b in breakers for position in range(len(text)) if text.startswith(b, position)]
    starts = [len(b"".join(PIECES[token] for token in recent[:i])) for i in range(len(recent))]
    return sum(start >= max(ends, default=0) for start in starts)


@PROPERTY
@given(tokens.map(lambda ids: [token for token in ids if PIECES[token]]), breakers)
def test_the_last_breaker_is_found_however_it_is_cut_into_tokens(recent, breakers):
    assert since_breaker(recent, PIECES, breakers) == naive_since_breaker(recent, breakers)


def naive_dry(logits, recent, multiplier, base, allowed, breakers):
    """Tries every token, every earlier position of it and every length of a run: quadratic and worse."""
    expected = logits.astype(np.float64)
    unbroken = since_breaker(recent, PIECES, breakers)
    for token in range(VOCABULARY):
        if any(breaker in PIECES[token] for breaker in breakers):
            continue
        lengths = [
            length
            for position in range(1, len(recent))
            if recent[position] == token
            for length in range(allowed, min(position, unbroken) + 1)
            if recent[position - length : position] == recent[len(recent) - length :]
        ]
        if lengths:
            expected[token] -= multiplier * base ** (max(lengths) - allowed)
    return expected


@PROPERTY
@given(logits, runs, st.floats(0, 3), st.floats(1, 2), st.integers(0, 4), breakers)
def test_dry_gives_the_penalties_of_trying_every_run(logits, recent, multiplier, base, allowed, breakers):
    before = logits.copy()
    actual = penalize_runs(logits, recent, multiplier, base, allowed, PIECES, breakers)
    expected = naive_dry(logits, recent, multiplier, base, allowed, breakers)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-9)
    assert np.array_equal(logits, before)


A, B, AB, COLON, IN, NONE = range(VOCABULARY)


@pytest.mark.parametrize(
    "recent, allowed, breakers, expected",  # of each token: the exponent, or None
    [
        ([A, B, COLON, A, B], 2, [], [None, None, None, 0, None, None]),  # `ab` went on with `:`
        ([A, B, COLON, A, B], 2, [b":"], [None] * 6),  # which is a breaker itself
        ([A, B, AB, A, B], 3, [], [None] * 6),
        ([A, B, AB, A, B], 1, [], [None, None, 1, None, None, None]),
        ([B, A, B, AB, NONE, A, B, A, B], 1, [], [1, None, 2, None, None, None]),  # after `ab`: a; after `bab`: ab
        ([A, B, AB, COLON, A, B], 2, [b":"], [None, None, 0, None, None, None]),  # the run begins behind it
        ([A, B, AB, A, COLON, B], 1, [b":"], [None, None, 0, None, None, None]),  # `b` alone is left of the run
        ([A, B, AB, IN, B, A], 1, [b":b"], [None, 0, None, None, None, None]),
        ([], 0, [], [None] * 6),
        ([A], 0, [], [None] * 6),
    ],
)
def test_dry_penalties_of_short_texts_by_hand(recent, allowed, breakers, expected):
    logits = np.zeros(VOCABULARY, np.float32)
    actual = penalize_runs(logits, recent, 1.0, 2.0, allowed, PIECES, breakers)
    assert actual.tolist() == [0.0 if n is None else -(2.0**n) for n in expected]


def test_the_dry_penalty_of_a_long_run_stays_finite():
    logits = np.full(VOCABULARY, -LARGEST, np.float32)
    actual = penalize_runs(logits, [A] * 5000, 1e6, 1e6, 2)
    assert np.isfinite(actual).all()
    assert actual[A] < actual[B] == -LARGEST
    assert penalize_runs(logits, [A] * 5000, 0.5, 1.0, 2)[A] == pytest.approx(-LARGEST - 0.5)
