"""Threads of a program that use one engine at once get what each would get by itself; so do those with one each."""

from __future__ import annotations

import threading

import pytest

import fiddler
from fiddler import Constraint, Sampling
from fiddler.generation.request import Request

GREEDY = Sampling(0.0)
PROMPTS = ("Once upon a time", "The cat sat on", "A big dog " + "ran and " * 30, "Lily said")
SCHEMA = Constraint.json_schema({"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}})


def work(engine, prompt, number):
    """Texts of all kinds; the prompt is read anew, so that what others leave in the cache makes no difference."""
    options = {"max_tokens": 8, "reuse": False}
    batch = dict(engine.batch([Request(prompt, GREEDY, 8, reuse=False), Request(prompt[:9], GREEDY, 8, reuse=False)]))
    return [
        *(engine.generate(prompt, GREEDY, **options).text for _ in range(2)),
        engine.generate(prompt, Sampling(0.8, seed=number), **options).text,
        "".join(engine.stream(prompt, GREEDY, **options)),
        engine.generate(prompt, GREEDY, constraint=SCHEMA, **options).text,
        [beam.text for beam in engine.beam_search(prompt, 3, 6, reuse=False)],
        [batch[index].text for index in (0, 1)],
        engine.logits([1, 2, 3, number]).tolist(),
    ]


def at_once(engines):
    """Results of a thread for each prompt, in the order of the prompts; a failure in its place."""
    results: list[object] = [None] * len(PROMPTS)

    def run(number, engine):
        try:
            results[number] = work(engine, PROMPTS[number], number)
        except Exception as error:  # noqa: BLE001
            results[number] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(engines)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    return results


@pytest.fixture(scope="module")
def alone():
    """Results one after another."""
    with fiddler.load(device="cpu", context=256) as engine:
        yield engine, [work(engine, prompt, number) for number, prompt in enumerate(PROMPTS)]


def test_threads_on_one_engine_get_what_each_gets_alone(alone):
    engine, expected = alone
    assert at_once([engine] * len(PROMPTS)) == expected


def test_threads_on_engines_of_their_own_get_what_each_gets_alone(alone):
    engines = [fiddler.load(device="cpu", context=256) for _ in PROMPTS]
    assert at_once(engines) == alone[1]
    for engine in engines:
        engine.close()


def test_a_cancelled_text_leaves_the_engine_to_other_threads(alone):
    engine, expected = alone
    pieces = engine.stream(PROMPTS[0], GREEDY, 100, reuse=False)
    next(pieces)
    assert at_once([engine] * len(PROMPTS)) == expected
    pieces.close()
    assert work(engine, PROMPTS[1], 1) == expected[1]
