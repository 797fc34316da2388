"""The prefix cache: a repeated prefix is not computed twice, and the tokens stay the same."""

from __future__ import annotations

from itertools import zip_longest

import pytest

import fiddler
from fiddler import Sampling
from fiddler.generation.request import Request
from fiddler.runtime.prefix_cache import common
from fiddler.telemetry.recorder import SilentRecorder
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
IDS = list(range(20, 60))


class ComputedRows(SilentRecorder):
    """Counts the rows of the first layer, and raises `error`, if there is one, once they are `at` rows."""

    wants_expert_ids = True

    def __init__(self):
        self.error, self.at, self.rows = None, 0, 0

    def chosen(self, layer, expert_ids):
        self.rows += len(expert_ids) if layer == 0 else 0
        if self.error is not None and self.rows >= self.at:
            raise self.error

    def since_last(self):
        """Rows computed since the last call."""
        count, self.rows = self.rows, 0
        return count


@pytest.fixture
def computed():
    return ComputedRows()


@pytest.fixture
def engine(tmp_path, computed):
    path = write_random_mixtral(tmp_path / "tiny.gguf")
    return fiddler.load(path, precision="exact", device="cpu", recorder=computed)


def greedy_uncached(engine, ids, count):
    """Greedy tokens computed without the prefix cache, which stays as it is."""
    sequence, tokens = engine.runner.sequence(), []
    logits = engine.runner.prefill(sequence, ids)
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = engine.runner.step([(sequence, tokens[-1:])]).logits[0]
    return tokens


def greedy(engine, ids, count=4):
    return engine.generate(ids, GREEDY, count, ignore_eos=False)


@pytest.mark.parametrize(
    "one, other, expected",
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 3], 1), ([2], [1], 0)],
)
def test_common_counts_the_equal_first_tokens(one, other, expected):
    assert common(one, other) == expected


@pytest.mark.parametrize(
    "prompt, uncached",
    [
        (IDS, 1),  # the same
        (IDS[:25], 1),  # its first tokens
        ([*IDS, 3, 4, 5], 3),  # continued
        ([*IDS[:30], 9, 8, 7], 3),  # differs on the way
        ([9, *IDS], 41),  # another
    ],
)
def test_only_tokens_after_the_common_prefix_are_computed(engine, computed, prompt, uncached):
    greedy(engine, IDS, 1)
    assert computed.since_last() == len(IDS)
    expected = greedy_uncached(engine, prompt, 4)
    computed.since_last()
    completion = greedy(engine, prompt)
    assert computed.since_last() == uncached + 3  # the last sampled token is not computed
    assert list(completion.tokens) == expected
    assert completion.stats.prompt_tokens == len(prompt)
    assert completion.stats.cached_tokens == len(prompt) - uncached


def test_generated_tokens_are_cached_too(engine, computed):
    """As in a chat: the next prompt is the last one, its answer, and more."""
    first = greedy(engine, IDS, 6)
    longer = [*IDS, *first.tokens, 7, 8, 9]
    expected = greedy_uncached(engine, longer, 4)
    second = greedy(engine, longer)
    assert list(second.tokens) == expected
    assert second.stats.cached_tokens == len(IDS) + 5
    computed.since_last()
    beams = engine.beam_search(longer, 3, 4)
    assert computed.since_last() <= 1 + 3 * 4
    engine.runner.forget()
    uncached_beams = engine.beam_search(longer, 3, 4)
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in uncached_beams]
    third = greedy(engine, longer)  # keys and values of the beams are not in the prompt's sequence
    assert list(third.tokens) == expected
    assert third.stats.cached_tokens == len(longer) - 1


def test_the_prompt_of_an_abandoned_generation_stays_cached(engine):
    running = engine.stream(IDS, GREEDY, 9)
    next(running)
    running.close()
    expected = greedy_uncached(engine, IDS, 4)
    completion = greedy(engine, IDS)
    assert list(completion.tokens) == expected
    assert completion.stats.cached_tokens == len(IDS) - 1


def test_interleaved_generations_with_a_common_prefix_give_the_same_tokens_as_alone(engine):
    """All of them begin with the same blocks."""
    greedy(engine, IDS, 1)
    prompts = [IDS, [*IDS[:30], 7], [*IDS, 4]]
    expected = [greedy_uncached(engine, prompt, 8) for prompt in prompts]
    generations = [engine.start(Request(prompt, GREEDY, 8)) for prompt in prompts]
    for _ in zip_longest(*generations):
        continue
    assert [list(generation.completion.tokens) for generation in generations] == expected
    assert [generation.completion.stats.cached_tokens for generation in generations] == [39, 30, 40]
    assert list(greedy(engine, IDS, 8).tokens) == expected[0]


@pytest.mark.parametrize("error, cached", [(KeyboardInterrupt, 43), (RuntimeError, 43)])
@pytest.mark.parametrize("at", [1, 44])
@pytest.mark.parametrize("compiled", [True, False])
def test_an_aborted_generation_leaves_its_whole_steps_cached(
    engine, computed, error, cached, at, compiled, monkeypatch
):
    """Whatever the exception was, and whichever way the step went that the recorder broke off."""
    if not compiled:
        monkeypatch.setattr(engine.runner, "_decoder", None)
    expected = greedy_uncached(engine, IDS, 9)
    computed.since_last()
    computed.error, computed.at = error("stop"), at
    with pytest.raises(error):
        greedy(engine, IDS, 9)
    assert engine.runner.matched([*IDS, *expected]) == (cached if at == 44 else 0)
    computed.error = None
    assert list(greedy(engine, IDS, 9).tokens) == expected


@pytest.mark.parametrize("sampling", [GREEDY, fiddler.Sampling(seed=3)])
def test_a_generation_without_reuse_computes_its_whole_prompt_each_time(engine, computed, sampling):
    """In fewer bits, a prompt that is read in other chunks rounds differently, which could change the text."""
    first = engine.generate(IDS, sampling, 4, reuse=False)
    computed.since_last()
    assert engine.generate(IDS, sampling, 4, reuse=False).tokens == first.tokens
    assert computed.since_last() == len(IDS) + 3
    engine.generate(IDS, sampling, 1)
    assert computed.since_last() == 1


def test_chunks_read_before_a_prompt_was_cancelled_stay_cached(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "chunk", 8)
    ids, read = list(range(100, 150)), []

    def cancel(count):
        read.append(count)
        if count == 16:
            raise ValueError("cancelled")

    with pytest.raises(ValueError, match="cancelled"):
        list(engine.start(Request(ids, GREEDY, 4), on_chunk=cancel))
    assert read == [8, 16]
    assert greedy(engine, ids).stats.cached_tokens == 16
