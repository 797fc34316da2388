"""Beam search on the demo model against transformers; the ends of a beam; and its KV cache, which follows it.

`tools/compare_beams.py` compares more prompts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fiddler
from fiddler.cli.app import command_line
from fiddler.errors import FileFormatError, RequestError
from fiddler.loading import DEMO_MODEL
from oracles.reference import from_gguf
from tools.compare_beams import BEGINNINGS, STORIES, WIDTHS, beginning, near_the_end, their_beams


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(precision="exact", device="cpu")


@pytest.fixture(scope="module")
def reference():
    """The demo model in transformers, on one thread: with so small a model several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield from_gguf(DEMO_MODEL)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def near_end(engine):
    return near_the_end(engine, STORIES[0])


def assert_same_beams(ours, expected):
    assert [list(beam.tokens) for beam in ours] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in expected], atol=1e-3)


@pytest.mark.parametrize("num_beams", WIDTHS)
def test_beams_are_those_of_transformers(engine, reference, near_end, num_beams):
    """Every beam's tokens and score, whether it ends by itself or not."""
    reasons = set()
    for ids in (beginning(engine, BEGINNINGS[0]), beginning(engine, BEGINNINGS[6]), near_end):
        ours = engine.beam_search(ids, num_beams, 24)
        assert_same_beams(ours, their_beams(reference, ids, num_beams, 24, engine.tokenizer.eos_id))
        assert len(ours) == num_beams
        reasons |= {beam.finish_reason for beam in ours}
        for beam in ours:
            ends = beam.tokens[-1] == engine.tokenizer.eos_id
            assert beam.finish_reason == ("stop" if ends else "length")
            assert beam.text == engine.tokenizer.decode(beam.tokens[: -1 if ends else None], continuing=True)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("early_stopping, length_penalty", [(True, 1.0), ("never", 2.0), (False, -1.0)])
def test_beam_options_act_as_in_transformers(engine, reference, near_end, early_stopping, length_penalty):
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    expected = their_beams(reference, near_end, 3, 20, engine.tokenizer.eos_id, **options)
    assert_same_beams(engine.beam_search(near_end, 3, 20, **options), expected)


def test_ignored_end_tokens_are_never_chosen(engine, reference, near_end):
    """As with transformers' suppressed tokens, the probabilities of the others do not change."""
    eos = engine.tokenizer.eos_id
    assert any(eos in beam.tokens for beam in engine.beam_search(near_end, 3, 16))
    expected = their_beams(reference, near_end, 3, 16, eos, suppress_tokens=[eos])
    assert_same_beams(engine.beam_search(near_end, 3, 16, ignore_eos=True), expected)


def test_a_stop_string_ends_a_beam(engine):
    """The beam's text ends before the stop string; its tokens and score include it."""
    beams = engine.beam_search("Once upon a time", 4, 24, stop=["little", "named"])
    assert {beam.finish_reason for beam in beams} == {"stop"}
    for beam in beams:
        whole = engine.tokenizer.decode(beam.tokens, continuing=True)
        assert whole.startswith(beam.text)
        assert whole[len(beam.text) :].startswith(("little", "named"))
        assert "little" not in engine.tokenizer.decode(beam.tokens[:-1], continuing=True)


def test_beam_scores_are_those_of_a_rescore(engine):
    """Scores computed beam by beam, on copied caches, are those of the whole text at once; in `fast` nearly so."""
    ids = engine.tokenizer.encode("Sam was sad because", add_bos=True)
    for beam in engine.beam_search(ids, 8, 32, length_penalty=0.0):
        logits = engine.logits([*ids, *beam.tokens])[len(ids) - 1 : -1]
        steps = torch.log_softmax(logits.double(), -1)[range(len(beam.tokens)), list(beam.tokens)]
        assert abs(float(steps.sum()) - beam.score) < 1e-3


def test_all_beams_advance_in_one_step(engine, monkeypatch):
    """One step a token for all beams, the prompt computed once, and no more sequences than beams."""
    steps, created = [], []
    step, sequence = engine.runner.step, engine.runner.sequence

    def recording_step(parts, wanted=None, **options):
        steps.append([len(tokens) for _, tokens in parts])
        return step(parts, wanted, **options)

    monkeypatch.setattr(engine.runner, "step", recording_step)
    monkeypatch.setattr(engine.runner, "sequence", lambda: created.append(1) or sequence())
    ids = list(range(10, 30))
    engine.beam_search(ids, 4, 12, ignore_eos=True)
    assert steps == [[20], *[[1] * 4] * 11]
    assert len(created) <= 4
    steps.clear()
    engine.beam_search(ids, 4, 2, ignore_eos=True)
    assert steps == [[1], [1] * 4]  # the prompt is cached, except its last token


def test_zero_tokens_give_one_empty_beam_and_the_context_limits_the_others(engine):
    (beam,) = engine.beam_search("Once upon a time", 4, 0)
    assert (beam.text, beam.tokens, beam.finish_reason) == ("", (), "length")
    small = fiddler.load(precision="exact", device="cpu", context=12)
    beams = small.beam_search("Once upon a time", 3, ignore_eos=True)
    room = 12 - len(small.tokenizer.encode("Once upon a time", add_bos=True))
    assert [len(beam.tokens) for beam in beams] == [room] * 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"width": 0}, "0 beams"),
        ({"max_tokens": 10**6}, "exceed the context"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"early_stopping": "sometimes"}, "early_stopping is 'sometimes'"),
    ],
)
def test_requests_that_make_no_sense_are_refused(engine, arguments, message):
    with pytest.raises(RequestError, match=message):
        engine.beam_search("Once", **arguments)


def test_logits_of_nan_are_an_error(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "logits", lambda hidden: torch.full((len(hidden), 8), torch.nan))
    with pytest.raises(FileFormatError, match=r"computes nan after \d tokens"):
        engine.beam_search("Once", 2, 4, reuse=False)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--beams", "0"], "--beams"),
        (["--beams", "4", "--temp", "0.8", "--seed", "1"], "--temp, --seed: not with --beams"),
        (["--beams", "2", "--n-best", "3"], "--n-best 3 of 2 beams"),
        (["--n-best", "1", "--early-stopping", "true"], "--n-best, --early-stopping: only with --beams"),
        (["--beams", "2", "--length-penalty", "nan"], "length_penalty is nan"),
        (["--beams", "2", "--early-stopping", "maybe"], "--early-stopping"),
    ],
)
def test_contradictory_and_wrong_beam_options_are_wrong_usage(arguments, message):
    done = CliRunner().invoke(command_line(), ["run", "-p", "Once", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert message in done.output


def test_the_command_line_prints_the_best_text_or_the_n_best_with_scores(engine):
    """The best text, or the n best below their scores; details of these with --stats."""
    arguments = ["run", "-p", "Once upon a time", "-n", "8", "--precision", "exact", "--device", "cpu", "--beams", "3"]
    beams = engine.beam_search("Once upon a time", 3, 8)
    assert CliRunner().invoke(command_line(), arguments).stdout == beams[0].text + "\n"
    done = CliRunner().invoke(command_line(), [*arguments, "--n-best", "2", "--stats"])
    assert done.stdout == "".join(
        f"== {rank}: score {beam.score:.4f}\n{beam.text}\n" for rank, beam in enumerate(beams[:2], 1)
    )
    assert f"scores of 2 of 3 beams: {beams[0].score:.4f} (8 tokens, length)" in done.stderr
    assert "generation 8 tokens" in done.stderr
