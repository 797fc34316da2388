"""The rules of beam search: by hand where they are simple, and against transformers on a model of sixteen tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import MixtralConfig, MixtralForCausalLM

from fiddler.errors import RequestError
from fiddler.generation.beam_hypotheses import BeamOptions, Hypotheses, best
from fiddler.sampling.logprobs import log_softmax

END = 3


def search(steps, options, limit, ends=(END,)):
    """The hypotheses of a finished search; `steps`: a row of probabilities per step, the same for every beam."""
    hypotheses = Hypotheses(options, limit, lambda beam, token: token in ends, len(ends))
    for row in steps:
        hypotheses.advance(np.log(np.array([row] * len(hypotheses.live))))
        if hypotheses.over:
            break
    return hypotheses


def result(hypotheses):
    return [(beam.tokens, round(beam.score, 4)) for beam in hypotheses.finished]


@pytest.mark.parametrize(
    "count, expected",
    [
        (1, [(1, 2)]),
        (2, [(1, 2), (0, 1)]),
        (4, [(1, 2), (0, 1), (1, 0), (0, 0)]),
        (9, [(1, 2), (0, 1), (1, 0), (0, 0)]),
    ],
)
def test_the_best_come_first_and_of_equals_the_lower_position(count, expected):
    """-inf, the value of a banned token, is never among them."""
    assert best(np.array([[1.0, 2.0, -math.inf], [2.0, -math.inf, 5.0]]), count) == expected


def test_a_beam_that_ends_makes_room_for_the_next_best_one():
    hypotheses = search([[0.3, 0.1, 0.1, 0.5]], BeamOptions(2), 9)
    assert [(beam.tokens, round(math.exp(beam.total), 6)) for beam in hypotheses.live] == [((0,), 0.3), ((1,), 0.1)]
    assert result(hypotheses) == [((END,), round(math.log(0.5), 4))]
    assert not hypotheses.over


def test_an_end_token_that_is_not_among_the_best_is_dropped():
    hypotheses = search([[0.3, 0.4, 0.1, 0.2]], BeamOptions(2), 9)
    assert not hypotheses.finished
    assert [beam.tokens for beam in hypotheses.live] == [(1,), (0,)]


def test_at_the_token_limit_every_beam_is_finished():
    hypotheses = search([[0.6, 0.4, 0.0001, 0.0001], [0.7, 0.3, 0.0001, 0.0001]], BeamOptions(2), 2)
    assert hypotheses.over
    assert result(hypotheses) == [((0, 0), round(math.log(0.42) / 2, 4)), ((1, 0), round(math.log(0.28) / 2, 4))]


@pytest.mark.parametrize(
    "early, penalty, steps",
    [
        (True, 1.0, 2),  # two beams are finished
        (False, 1.0, 3),  # log(0.0045) / 3 is less than log(0.3) / 1, the worst finished score
        ("never", 1.0, 9),  # log(0.0045) / 9 is not
        (False, 0.0, 3),  # log(0.0045) is less than log(0.12)
        ("never", 0.0, 3),
        (False, 2.0, 9),  # log(0.0045) / 3**2 and every later score is more than log(0.3)
        ("never", -1.0, 3),
    ],
)
def test_early_stopping_and_length_penalty_decide_when_the_search_ends(early, penalty, steps):
    """Finished beams have probabilities of 0.3 and 0.6 * 0.2; the best live one has 0.6, 0.45 and then 0.0045."""
    rows = [[0.05, 0.05, 0.6, 0.3], [0.03, 0.02, 0.75, 0.2], [0.008, 0.009, 0.01, 0.001]]
    hypotheses = search(rows + [[0.001, 0.001, 0.99, 0.0001]] * 9, BeamOptions(2, penalty, early), 9)
    assert len(hypotheses.live[0].tokens if hypotheses.live else hypotheses.finished[0].tokens) == steps


def test_a_search_with_one_beam_is_greedy():
    rows = [[0.2, 0.5, 0.2, 0.1], [0.2, 0.2, 0.1, 0.5]]
    for early in (True, False, "never"):
        assert result(search(rows, BeamOptions(1, 2.0, early), 9)) == [((1, END), round(math.log(0.25) / 4, 4))]


def test_log_probabilities_of_large_logits_are_those_of_torch():
    expected = torch.log_softmax(torch.tensor([[1000.0, 999.0, -1000.0], [0.0, 0.0, 0.0]], dtype=torch.float64), -1)
    actual = log_softmax(np.array([[1000, 999, -1000], [0, 0, 0]], np.float32))
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_beams": 0}, "0 beams"),
        ({"num_beams": 2.5}, "2.5 beams"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"length_penalty": 51}, "length_penalty is 51"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(RequestError, match=message):
        BeamOptions(**arguments)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        experts_implementation="eager",
        attn_implementation="eager",
    )
    model = MixtralForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7)
    return model


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_searches_are_those_of_transformers(tiny, data):
    """Every beam and score, for random numbers of beams, penalties, ways to stop, limits, end tokens and prompts."""
    num_beams = data.draw(st.integers(2, 5))
    penalty = data.draw(st.sampled_from([1.0, 0.0, -1.0, 0.5, 2.0]))
    early = data.draw(st.sampled_from([True, False, "never"]))
    limit = data.draw(st.integers(1, 9))
    ends = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=2, unique=True))
    prompt = data.draw(st.lists(st.integers(0, 15), min_size=1, max_size=4))
    theirs = tiny.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=num_beams,
        do_sample=False,
        num_return_sequences=num_beams,
        length_penalty=penalty,
        early_stopping=early,
        max_new_tokens=limit,
        eos_token_id=ends,
        pad_token_id=ends[0],
        return_dict_in_generate=True,
        output_scores=True,
    )
    hypotheses = Hypotheses(BeamOptions(num_beams, penalty, early), limit, lambda beam, token: token in ends, len(ends))
    while not hypotheses.over:
        with torch.inference_mode():
            logits = tiny(torch.tensor([[*prompt, *beam.tokens] for beam in hypotheses.live])).logits[:, -1]
        hypotheses.advance(log_softmax(logits.numpy()))
    assert len(hypotheses.finished) == num_beams
    rows = zip(hypotheses.finished, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True)
    for beam, tokens, score in rows:
        padded = [*beam.tokens, *[ends[0]] * (len(tokens) - len(prompt) - len(beam.tokens))]
        assert padded == tokens[len(prompt) :]
        assert abs(beam.score - score) < 1e-4 * max(1.0, abs(score))
