"""Every argument of the Python API at its upper end, and beyond its type: a result or one short line, at once."""

from __future__ import annotations

import math
import time
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

import fiddler
from fiddler import Chat, Constraint, Request, Sampling
from fiddler.converters.conversion import convert
from fiddler.errors import FiddlerError
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.host_memory import peak_memory

PROMPT, GREEDY = "Once upon a time", Sampling(0.0)
NUMBERS = (0, -1, 1.5, True, 2**31, 2**63, 10**30, 10**400, 10**5000, math.nan, math.inf, -math.inf, 1e308, 5e-324)
NUMBERS += (np.int64(3), np.uint64(2**64 - 1), np.float32(0.5), Decimal("0.5"), Fraction(1, 2), 1j, None)
LARGE = "a" * 100_000_000
OTHERS = (
    LARGE,
    [LARGE],
    [f"x{n}" for n in range(100_000)],
    [5] * 100_000,
    np.zeros(100_000),
    b"ab",
    {"a": 1},
    object(),
)
DRAWN = {"temperature": 1.0, "dry_multiplier": 1.0, "xtc_probability": 0.5, "repeat_penalty": 1.1}


def sampled(name, value):
    return lambda e: e.generate(PROMPT, Sampling(**DRAWN | {name: value}), 2)


CALLS = {
    "generate prompt": lambda e, v: e.generate(v, GREEDY, 2),
    "generate token": lambda e, v: e.generate([v], GREEDY, 2),
    "generate sampling": lambda e, v: e.generate(PROMPT, v, 2),
    "generate max_tokens": lambda e, v: e.generate(PROMPT, GREEDY, v, stop=["."]),
    "generate stop": lambda e, v: e.generate(PROMPT, GREEDY, 2, stop=v),
    "generate a stop": lambda e, v: e.generate(PROMPT, GREEDY, 2, stop=[v]),
    "generate ignore_eos": lambda e, v: e.generate(PROMPT, GREEDY, 2, ignore_eos=v),
    "generate special": lambda e, v: e.generate(PROMPT, GREEDY, 2, special=v),
    "generate constraint": lambda e, v: e.generate(PROMPT, GREEDY, 2, constraint=v),
    "generate reuse": lambda e, v: e.generate(PROMPT, GREEDY, 2, reuse=v),
    "stream": lambda e, v: "".join(e.stream(v, GREEDY, 2)),
    "logits": lambda e, v: e.logits(v),
    "logits token": lambda e, v: e.logits([v]),
    "start": lambda e, v: e.start(v),
    "start prompt_cache": lambda e, v: e.start(Request(PROMPT), prompt_cache=v),
    "batch parallel": lambda e, v: list(e.batch([PROMPT], GREEDY, 2, parallel=v)),
    "batch max_tokens": lambda e, v: list(e.batch([PROMPT], GREEDY, v, stop=["."])),
    "batch request": lambda e, v: list(e.batch([v], GREEDY, 2)),
    "beams width": lambda e, v: e.beam_search(PROMPT, v, 2),
    "beams max_tokens": lambda e, v: e.beam_search(PROMPT, 2, v, stop=["."]),
    "beams length_penalty": lambda e, v: e.beam_search(PROMPT, 2, 2, length_penalty=v),
    "beams early_stopping": lambda e, v: e.beam_search(PROMPT, 2, 2, early_stopping=v),
    "beams reuse": lambda e, v: e.beam_search(PROMPT, 2, 2, reuse=v),
    "start_beams": lambda e, v: e.start_beams(v, BeamOptions(2)),
    "start_beams options": lambda e, v: e.start_beams(Request(PROMPT), v),
    "start_beams prompt_cache": lambda e, v: e.start_beams(Request(PROMPT), BeamOptions(2), prompt_cache=v),
    "chat message": lambda e, v: "".join(Chat(e, max_tokens=2).send(v)),
    "chat system": lambda e, v: "".join(Chat(e, v, max_tokens=2).send("x")),
    "a bias": lambda e, v: e.generate(PROMPT, Sampling(logit_bias={5: v}), 2),
    "grammar": lambda e, v: Constraint.grammar(v),
    "json_schema": lambda e, v: Constraint.json_schema(v),
    **{f"Sampling {each.name}": lambda e, v, name=each.name: sampled(name, v)(e) for each in fields(Sampling)},
}
LOADS = ("path", "device", "gpu_memory", "gpu_experts", "missing", "expert_counts", "threads", "context", "precision")
LOADS += ("kernel",)


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu", context=64, threads=1)


def assert_bounded(call, name):
    """`call` returns, or raises one short line, in 3 s of computing and 600 MiB: 6 of a text of 100 MB."""
    began, before, message = time.process_time(), peak_memory().peak_resident, ""
    try:
        call()
    except FiddlerError as error:
        message = str(error)
    assert len(message) < 500, name
    assert "\n" not in message, name
    assert time.process_time() - began < 3, name
    assert peak_memory().peak_resident - before < 600 << 20, name


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_hangs_takes_memory_or_raises_what_is_not_documented(engine, name):
    for value in (*NUMBERS, *OTHERS):
        assert_bounded(lambda value=value: CALLS[name](engine, value), f"{name} {type(value)}")


@pytest.mark.parametrize("name", LOADS)
def test_no_argument_of_load_does(name):
    for value in (*NUMBERS, *OTHERS):
        if value is None:
            continue  # the default
        assert_bounded(lambda value=value: fiddler.load(**{name: value}), f"{name} {type(value)}")


@pytest.mark.parametrize("name", ["source", "target", "dtype", "force"])
def test_no_argument_of_convert_does(tmp_path, name):
    for value in (*NUMBERS, *OTHERS):
        arguments = {"source": tmp_path / "nothing", "target": tmp_path / "out.gguf"} | {name: value}
        with pytest.raises(FiddlerError):
            convert(**arguments)
        assert_bounded(lambda: convert(**arguments), f"{name} {type(value)}")  # noqa: B023
