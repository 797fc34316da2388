"""Beam search on the model that ships, against transformers; what ends a beam; and that keys and values follow it.

`compare_beams.py` goes over more prompts.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fiddler
from fiddler.cli.app import app
from fiddler.errors import FileFormatError, RequestError
from fiddler.loading import DEMO_MODEL
from oracles.reference import from_gguf
from tools.compare_beams import BEGINNINGS, STORIES, WIDTHS, beginning, near_the_end, their_beams


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(precision="exact", device="cpu")


@pytest.fixture(scope="module")
def theirs():
    """On one thread: for so small a model several only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield from_gguf(DEMO_MODEL)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ending(engine):
    return near_the_end(engine, STORIES[0])


def held_against(ours, expected):
    assert [list(beam.tokens) for beam in ours] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([beam.score for beam in ours], [score for _, score in expected], atol=1e-3)


@pytest.mark.parametrize("width", WIDTHS)
def test_beams_are_those_of_transformers(engine, theirs, ending, width):
    """Every beam's tokens and score, whether it ends by itself or not."""
    reasons = set()
    for ids in (beginning(engine, BEGINNINGS[0]), beginning(engine, BEGINNINGS[6]), ending):
        ours = engine.beam_search(ids, width, 24)
        held_against(ours, their_beams(theirs, ids, width, 24, engine.tokenizer.eos_id))
        assert len(ours) == width
        reasons |= {beam.finish_reason for beam in ours}
        for beam in ours:
            ends = beam.tokens[-1] == engine.tokenizer.eos_id
            assert beam.finish_reason == ("stop" if ends else "length")
            assert beam.text == engine.tokenizer.decode(beam.tokens[: -1 if ends else None], continuing=True)
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("early_stopping, length_penalty", [(True, 1.0), ("never", 2.0), (False, -1.0)])
def test_options_are_those_of_transformers(engine, theirs, ending, early_stopping, length_penalty):
    options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
    expected = their_beams(theirs, ending, 3, 20, engine.tokenizer.eos_id, **options)
    held_against(engine.beam_search(ending, 3, 20, **options), expected)


def test_end_tokens_that_are_ignored_are_never_chosen(engine, theirs, ending):
    """As with transformers' suppressed tokens, the others' probabilities stay what they are."""
    eos = engine.tokenizer.eos_id
    assert any(eos in beam.tokens for beam in engine.beam_search(ending, 3, 16))
    expected = their_beams(theirs, ending, 3, 16, eos, suppress_tokens=[eos])
    held_against(engine.beam_search(ending, 3, 16, ignore_eos=True), expected)


def test_a_stop_string_ends_a_beam(engine):
    """Its text is cut before it, its tokens and score have it."""
    beams = engine.beam_search("Once upon a time", 4, 24, stop=["little", "named"])
    assert {beam.finish_reason for beam in beams} == {"stop"}
    for beam in beams:
        whole = engine.tokenizer.decode(beam.tokens, continuing=True)
        assert whole.startswith(beam.text)
        assert whole[len(beam.text) :].startswith(("little", "named"))
        assert "little" not in engine.tokenizer.decode(beam.tokens[:-1], continuing=True)


def test_scores_are_those_of_a_rescore(engine):
    """What was computed beam by beam, copied to and fro, is what the whole text gives at once; in `fast` nearly so."""
    ids = engine.tokenizer.encode("Sam was sad because", add_bos=True)
    for beam in engine.beam_search(ids, 8, 32, length_penalty=0.0):
        logits = engine.logits([*ids, *beam.tokens])[len(ids) - 1 : -1]
        steps = torch.log_softmax(logits.double(), -1)[range(len(beam.tokens)), list(beam.tokens)]
        assert abs(float(steps.sum()) - beam.score) < 1e-3


def test_several_beams_are_one_step(engine, monkeypatch):
    """A step a token for all of them, the prompt computed once, and no more sequences than beams."""
    steps, made = [], []
    step, sequence = engine.runner.step, engine.runner.sequence

    def watched(parts, wanted=None):
        steps.append([len(tokens) for _, tokens in parts])
        return step(parts, wanted)

    monkeypatch.setattr(engine.runner, "step", watched)
    monkeypatch.setattr(engine.runner, "sequence", lambda: made.append(1) or sequence())
    ids = list(range(10, 30))
    engine.beam_search(ids, 4, 12, ignore_eos=True)
    assert steps == [[20], *[[1] * 4] * 11]
    assert len(made) <= 4
    steps.clear()
    engine.beam_search(ids, 4, 2, ignore_eos=True, reuse=True)
    assert steps == [[1], [1] * 4]  # the prompt is there already, but for its last token


def test_no_tokens_and_the_end_of_the_context(engine):
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
def test_what_makes_no_sense_is_refused(engine, arguments, message):
    with pytest.raises(RequestError, match=message):
        engine.beam_search("Once", **arguments)


def test_what_is_no_number_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "logits", lambda hidden: torch.full((len(hidden), 8), torch.nan))
    with pytest.raises(FileFormatError, match=r"computes nan after \d tokens"):
        engine.beam_search("Once", 2, 4)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--beams", "0"], "--beams"),
        (["--beams", "4", "--temp", "0.8", "--seed", "1"], "--temp, --seed: not with --beams"),
        (["--beams", "2", "--n-best", "3"], "--n-best 3 of 2 beams"),
        (["--n-best", "1", "--early-stopping", "true"], "--n-best, --early-stopping: only with --beams"),
        (["--beams", "2", "--length-penalty", "nan"], "length_penalty is nan"),
        (["--beams", "2", "--early-stopping", "maybe"], "--early-stopping"),
    ],
)
def test_wrong_usage(arguments, said):
    done = CliRunner().invoke(app, ["run", "-p", "Once", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert said in done.output


def test_on_the_command_line(engine):
    """The best text, or the best few below their scores; more about them with --stats."""
    given = ["run", "-p", "Once upon a time", "-n", "8", "--precision", "exact", "--device", "cpu", "--beams", "3"]
    beams = engine.beam_search("Once upon a time", 3, 8)
    assert CliRunner().invoke(app, given).stdout == beams[0].text + "\n"
    done = CliRunner().invoke(app, [*given, "--n-best", "2", "--stats"])
    assert done.stdout == "".join(
        f"== {rank}: score {beam.score:.4f}\n{beam.text}\n" for rank, beam in enumerate(beams[:2], 1)
    )
    assert f"scores of 2 of 3 beams: {beams[0].score:.4f} (8 tokens, length)" in done.stderr
    assert "generation 8 tokens" in done.stderr
