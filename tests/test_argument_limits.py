"""Every argument of the Python API at its upper end, and beyond its type: a result or one short line, at once.

The arguments are those of the signatures, so a new one is tried as well.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fiddler
from fiddler import Chat, Constraint, Engine, Request, Sampling
from fiddler.errors import FiddlerError
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.host_memory import peak_memory
from fiddler.text.tokenizer import Tokenizer

TINY = Path(__file__).parent / "data" / "tiny"
PROMPT, GREEDY = "Once upon a time", Sampling(0.0)
LARGE = "a" * 100_000_000
CALLBACKS = {"on_chunk", "on_step", "notify", "progress", "recorder"}  # what they do is the caller's matter


class Index:
    """A whole number of no known type."""

    def __index__(self) -> int:
        return 10**400


class Hidden:
    """An object that cannot be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("never")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = (0, -1, 1.5, True, 2**31, 2**63, 10**30, 10**400, 10**5000, math.nan, math.inf, -math.inf, 1e308, 5e-324)
NUMBERS += (np.int64(3), np.uint64(2**64 - 1), np.float32(0.5), Decimal("0.5"), Fraction(1, 2), 1j, None, Index())
TEXTS = (LARGE, "", "1", "\0", "\ud800", "a\nb\x1b[31m", b"ab", bytearray(b"ab"), Path("nowhere"))
SEVERAL = ([LARGE], [f"x{n}" for n in range(100_000)], [5] * 100_000, range(10**12), range(10**30), nested(100_000))
SEVERAL += ([[]], [None], [True], [1.5], {"a": 1}, {1, 2}, iter(()))
ARRAYS = (np.zeros(100_000), np.array([1, 2]), np.array([], int), np.array("a"), np.array(["a", "b"]))
ARRAYS += (torch.tensor(3), torch.tensor(math.nan), torch.tensor([1, 2]), torch.tensor([[1]]))
OTHERS = (object(), Hidden(), type, len, ..., slice(1, 2), np.datetime64("2020"))
VALUES = (*NUMBERS, *TEXTS, *SEVERAL, *ARRAYS, *OTHERS)


@dataclass(frozen=True)
class Call:
    """A function of the API, the arguments that it needs, and how its result is used."""

    function: Callable[..., Any]
    given: Mapping[str, Any] = field(default_factory=dict)
    use: Callable[[Engine, Any], object] = lambda engine, result: result
    of: Callable[[Engine], Any] | None = None  # whose method it is


def text_of(engine: Engine, request: Request) -> object:
    return engine.start(request).run()


def constrained(engine: Engine, constraint: Constraint) -> object:
    return engine.generate(PROMPT, GREEDY, 2, constraint=constraint)


WITH_PROMPT = {"prompt": PROMPT, "sampling": GREEDY, "max_tokens": 2}
DRAWN = {"temperature": 1.0, "dry_multiplier": 1.0, "xtc_probability": 0.5, "repeat_penalty": 1.1}
CALLS = {
    "generate": Call(Engine.generate, WITH_PROMPT, of=lambda e: e),
    "stream": Call(Engine.stream, WITH_PROMPT, lambda e, pieces: "".join(pieces), lambda e: e),
    "logits": Call(Engine.logits, {"ids": [1]}, of=lambda e: e),
    "batch": Call(
        Engine.batch, {"requests": [PROMPT], "sampling": GREEDY, "max_tokens": 2}, lambda e, r: list(r), lambda e: e
    ),
    "beam_search": Call(Engine.beam_search, {"prompt": PROMPT, "width": 2, "max_tokens": 2}, of=lambda e: e),
    "start": Call(Engine.start, {"request": Request(PROMPT, GREEDY, 2)}, lambda e, started: started.run(), lambda e: e),
    "start_beams": Call(
        Engine.start_beams,
        {"request": Request(PROMPT, max_tokens=2), "options": BeamOptions(2)},
        lambda e, started: started.run(),
        lambda e: e,
    ),
    "scheduler": Call(Engine.scheduler, of=lambda e: e),
    "Request": Call(Request, WITH_PROMPT, text_of),
    "Sampling": Call(Sampling, DRAWN, lambda e, sampling: e.generate(PROMPT, sampling, 2)),
    "BeamOptions": Call(
        BeamOptions, {"num_beams": 2}, lambda e, options: e.start_beams(Request(PROMPT, max_tokens=2), options).run()
    ),
    "Constraint": Call(Constraint, {}, constrained),
    "Constraint.grammar": Call(Constraint.grammar, {}, constrained),
    "Constraint.json_schema": Call(Constraint.json_schema, {}, constrained),
    "Chat": Call(Chat, {"engine": None, "max_tokens": 2}, lambda e, chat: "".join(chat.send("x"))),
    "Chat.send": Call(Chat.send, {}, lambda e, pieces: "".join(pieces), lambda e: Chat(e, max_tokens=2)),
    "encode": Call(Tokenizer.encode, {"text": "a"}, of=lambda e: e.tokenizer),
    "decode": Call(Tokenizer.decode, {"ids": [5]}, of=lambda e: e.tokenizer),
    "decode_bytes": Call(Tokenizer.decode_bytes, {"ids": [5]}, of=lambda e: e.tokenizer),
    "token": Call(Tokenizer.token, of=lambda e: e.tokenizer),
    "pieces": Call(Tokenizer.pieces, {}, lambda e, result: None, lambda e: e.tokenizer),
    "load": Call(fiddler.load, {"device": "cpu", "context": 64}),
    "convert": Call(fiddler.convert, {"source": TINY, "target": None, "force": True}),
}
ARGUMENTS = [
    (name, parameter)
    for name, call in CALLS.items()
    for parameter in inspect.signature(call.function).parameters
    if parameter not in CALLBACKS | {"self"}
]
UNTRIED = {"Beam", "Completion", "Engine", "FiddlerError"}  # results, an error


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu", context=64, threads=1)


def test_every_public_name_is_tried():
    methods = {name for name, each in inspect.getmembers(Engine, inspect.isfunction) if name[0] != "_"} - {"close"}
    assert CALLS.keys() >= set(fiddler.__all__) - UNTRIED | methods


def tried(name: str, argument: str, value: object) -> bool:
    """Whether a result is due at once: not for 100,000 prompts, nor for threads and a context that are there."""
    if (name, argument) == ("batch", "requests"):
        return not isinstance(value, list | range | np.ndarray)
    if (name, argument) == ("encode", "text"):
        return value is not LARGE  # 20 s: linear in its length
    return not (name == "load" and (value is None or argument == "path"))


@pytest.mark.parametrize("name, argument", ARGUMENTS)
def test_no_argument_hangs_takes_memory_or_raises_what_is_not_documented(engine, tmp_path, monkeypatch, name, argument):
    monkeypatch.chdir(tmp_path)  # some values are names of files
    call = CALLS[name]
    places = {"engine": engine, "target": tmp_path / "out.gguf"}
    given = {key: places.get(key, value) for key, value in call.given.items()}
    function = call.function if call.of is None else getattr(call.of(engine), call.function.__name__)
    for value in filter(lambda value: tried(name, argument, value), VALUES):
        began, before, message = time.process_time(), peak_memory().peak_resident, ""
        try:
            call.use(engine, function(**{**given, argument: value}))
        except FiddlerError as error:
            message = str(error)
        case = f"{argument}: {type(value)}, {message}"
        assert len(message) < 500, case
        assert message.isprintable(), case
        assert time.process_time() - began < 3, case
        assert peak_memory().peak_resident - before < 600 << 20, case  # 6 of a text of 100 MB


def test_no_path_of_a_model_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        if value is not None:
            with pytest.raises(FiddlerError) as error:
                fiddler.load(value)
            assert len(str(error.value)) < 500
            assert str(error.value).isprintable()


def test_a_bias_is_a_finite_number():
    taken = [value for value in VALUES if is_bias(value)]
    assert len(taken) == 8
    assert all(abs(float(value)) <= 1e6 or value == -math.inf for value in taken)


def is_bias(value: Any) -> bool:
    try:
        Sampling(logit_bias={5: value})
    except FiddlerError:
        return False
    return True
