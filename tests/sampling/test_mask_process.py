"""Grammars of strangers whose masks take too long: each ends its own text, and no other one notices."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import fiddler
from fiddler import Constraint, Sampling
from fiddler.errors import RequestError
from fiddler.generation.request import Request
from fiddler.sampling.constraint import TokenGuide, Vocabulary
from fiddler.sampling.mask_process import MaskProcess

TOO_LONG = "the constraint cannot be followed: it takes more than .* s of computing and 50 ms a token; give a simpler"


def ambiguous(count: int) -> str:
    """Lark that is checked at once, and whose first mask takes the longer the more alternatives it has."""
    return " | ".join([f"start start /x/ | /[a-z ]{{1,{n}}}/" for n in range(1, count)])


LATER = f'start: "a red boat" x\nx: {ambiguous(500).replace("start start", "x x")}'


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(threads=1)


@pytest.fixture
def process(engine):
    made = MaskProcess(engine.tokenizer, seconds=0.5, memory=200 << 20)
    yield made
    made.close()


def guide_of(engine, process, source):
    return TokenGuide(process, source, engine.tokenizer.vocab_size, engine.tokenizer.end_ids)


def follow(engine, guide, text):
    """Advance a guide by the tokens of a text; the masks allow each of them."""
    for token in engine.tokenizer.encode(text, continuing=True):
        assert guide.allowed()[token]
        guide.advance(token)


def test_a_first_mask_that_takes_too_long_is_one_error_in_bounded_time(engine):
    constraint = Constraint.grammar(f"start: {ambiguous(1000)}")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
    with pytest.raises(RequestError, match=TOO_LONG):
        engine.start(Request("Tom", constraint=constraint))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 3.5  # [s]; 2 s and the start
    assert time.process_time() - began < 1


def test_a_grammar_that_grows_later_ends_its_text_alone(engine):
    good = Constraint.grammar('root ::= "a red boat" | "a red ball"')
    requests = [
        Request("Tom has", Sampling(0.0), 30, constraint=each) for each in (good, Constraint.grammar(LATER), good)
    ]
    outcomes = dict(engine.batch(requests, parallel=3))
    assert outcomes[0].text == outcomes[2].text == engine.generate("Tom has", Sampling(0.0), 30, constraint=good).text
    with pytest.raises(RequestError, match=TOO_LONG):
        raise outcomes[1]


def test_guides_go_on_after_another_ended_the_process(engine, process):
    first, second = (guide_of(engine, process, 'start: "a red boat" | "a red ball"') for _ in range(2))
    follow(engine, first, "a red")
    copied = first.copy()
    hostile = guide_of(engine, process, LATER)
    follow(engine, hostile, "a red")
    with pytest.raises(RequestError, match=TOO_LONG):
        follow(engine, hostile, " boat" + "abc" * 20)
    follow(engine, copied, " ball")
    follow(engine, first, " boat")
    follow(engine, second, "a red ball")
    assert first.finished
    assert second.finished
    assert copied.finished


def test_a_copy_advances_by_itself_and_lives_on_without_its_origin(engine, process):
    origin = guide_of(engine, process, 'start: "a red boat" | "a red ball"')
    follow(engine, origin, "a red")
    copied = origin.copy()
    follow(engine, origin, " boat")
    assert not copied.finished
    del origin
    follow(engine, copied, " ball")
    assert copied.finished


def test_a_text_has_time_by_its_length_and_not_for_ever(engine, process):
    """Masks that each take less than the limit, but far more than 50 ms, empty the account."""
    guide = guide_of(engine, process, f"start: {ambiguous(150)}")
    began = time.monotonic()
    with pytest.raises(RequestError, match=TOO_LONG):
        follow(engine, guide, "a" * 1000)
    assert time.monotonic() - began < 60


def test_memory_of_a_guide_is_limited_and_its_neighbours_stay(engine, process):
    good = guide_of(engine, process, 'start: "a red boat" | "a red ball"')
    follow(engine, good, "a red")
    small = MaskProcess(engine.tokenizer, seconds=5.0, memory=1 << 20)
    with pytest.raises(RequestError, match="takes more than 1 MiB of memory; give a simpler one"):
        guide_of(engine, small, f"start: {ambiguous(700)}").allowed()
    small.close()
    follow(engine, good, " ball")
    assert good.finished


def test_masks_have_a_place_for_every_token(engine):
    allowed = Vocabulary(engine.tokenizer).guide(Constraint.grammar("root ::= .*")).allowed()
    assert allowed.shape == (engine.tokenizer.vocab_size,)
    assert allowed.dtype == np.bool_


def test_neither_process_of_a_grammar_inherits_more_than_path_language_and_time_zone(engine, process, monkeypatch):
    """The one that follows it, by its own environment, and the one that reads it, by what it is started with."""
    given, real = [], subprocess.run
    monkeypatch.setenv("SECRET_TOKEN", "12345")

    def run(*words, **options):
        given.append(options["env"])
        return real(*words, **options)

    monkeypatch.setattr(subprocess, "run", run)
    source = Constraint.grammar('root ::= "a"').source
    guide_of(engine, process, source).allowed()
    raw = Path(f"/proc/{process._process.pid}/environ").read_bytes().decode()
    given.append(dict(entry.split("=", 1) for entry in raw.split("\0") if entry))
    assert len(given) == 2
    for environment in given:
        assert environment.keys() <= {"PATH", "PYTHONPATH", "LANG", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME"}
