"""A repeated beginning is not computed twice, and nobody notices but the clock."""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.gpu.runner import GpuRunner
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.prefix_cache import PrefixCache, common
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
IDS = list(range(20, 60))


class CountedExperts:
    """Passes on to the engine's experts, counts the rows of the first layer, and stops where it is told to."""

    def __init__(self, experts, error=None, at=None):
        self.experts, self.error, self.at, self.rows = experts, error, at, 0

    def __call__(self, layer, x, ids, weights):
        self.rows += len(x) if layer == 0 else 0
        if self.error is not None and self.rows >= self.at:
            raise self.error
        return self.experts(layer, x, ids, weights)


@pytest.fixture
def engine(tmp_path):
    engine = fiddler.load(write_random_mixtral(tmp_path / "tiny.gguf"), precision="exact", device="cpu")
    engine.runner.model.experts = CountedExperts(engine.runner.model.experts)
    return engine


def rows(engine):
    """Computed since the last time."""
    counted = engine.runner.model.experts
    found, counted.rows = counted.rows, 0
    return found


def anew(engine, ids, count):
    """The greedy tokens, computed with nothing kept; what is kept stays."""
    sequence, made = engine.runner.sequence(), []
    logits = engine.runner.prefill(sequence, ids)
    for _ in range(count):
        made.append(int(logits.argmax()))
        logits = engine.runner.logits(engine.runner.step([(sequence, made[-1:])]))[0]
    rows(engine)
    return made


def greedy(engine, ids, count=4):
    return engine.generate(ids, GREEDY, count, ignore_eos=False, reuse=True)


@pytest.mark.parametrize(
    "one, other, expected",
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 2], 2), ([1, 2], [1, 3], 1), ([2], [1], 0)],
)
def test_what_two_texts_have_in_common(one, other, expected):
    assert common(one, other) == expected


@pytest.mark.parametrize(
    "ids, left", [([5, 6, 7, 8], 3), ([5, 6, 7], 2), ([5], 0), ([5, 6, 9], 2), ([9], 0), ([], 0), ([5, 6, 7, 8, 9], 3)]
)
def test_what_is_taken_is_cut_to_what_is_shared(engine, ids, left):
    """But for one token, which is computed for its logits; and it can be taken once."""
    prefix_cache, sequence = PrefixCache(), engine.runner.sequence()
    engine.runner.step([(sequence, [5, 6, 7])])
    prefix_cache.put(sequence, [5, 6, 7, 8])  # the last one was chosen, not computed
    assert prefix_cache.tokens == (5, 6, 7)
    assert prefix_cache.take(ids) is sequence
    assert sequence.length == left
    assert prefix_cache.take(ids) is None
    assert not prefix_cache.holds(sequence)
    assert not prefix_cache.holds(None)


@pytest.mark.parametrize(
    "prompt, computed",
    [
        (IDS, 1),  # the same
        (IDS[:25], 1),  # its beginning
        ([*IDS, 3, 4, 5], 3),  # goes on
        ([*IDS[:30], 9, 8, 7], 3),  # parts on the way
        ([9, *IDS], 41),  # another
    ],
)
def test_only_what_is_new_is_computed(engine, prompt, computed):
    greedy(engine, IDS, 1)
    assert rows(engine) == len(IDS)
    expected = anew(engine, prompt, 4)
    made = greedy(engine, prompt)
    assert rows(engine) == computed + 3  # the last token that is chosen is not computed
    assert list(made.tokens) == expected
    assert made.stats.prompt_tokens == len(prompt)
    assert made.stats.cached_tokens == len(prompt) - computed


def test_what_was_generated_is_kept_too(engine):
    """As in a chat: the next prompt is the last one, its answer, and more."""
    first = greedy(engine, IDS, 6)
    longer = [*IDS, *first.tokens, 7, 8, 9]
    expected = anew(engine, longer, 4)
    made = greedy(engine, longer)
    assert list(made.tokens) == expected
    assert made.stats.cached_tokens == len(IDS) + 5
    beams = engine.beam_search(longer, 3, 4, reuse=True)
    assert rows(engine) < 4 + 1 + 3 * 4 + 4
    engine.runner.prefix_cache.drop()
    anew_too = engine.beam_search(longer, 3, 4, reuse=True)
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in anew_too]
    after = greedy(engine, longer)  # the beams' own keys and values are not the prompt's
    assert list(after.tokens) == expected
    assert after.stats.cached_tokens == len(longer) - 1


def test_a_generation_that_is_abandoned(engine):
    running = engine.stream(IDS, GREEDY, 9, reuse=True)
    next(running)
    running.close()
    expected = anew(engine, IDS, 4)
    made = greedy(engine, IDS)
    assert list(made.tokens) == expected
    assert made.stats.cached_tokens == len(IDS) - 1


def test_generations_that_run_side_by_side(engine):
    """Three with one beginning, in turns: each as alone, whoever had the kept sequence."""
    greedy(engine, IDS, 1)
    prompts = [IDS, [*IDS[:30], 7], [*IDS, 4]]
    expected = [anew(engine, prompt, 8) for prompt in prompts]
    generations = [engine.start(prompt, GREEDY, 8, reuse=True) for prompt in prompts]
    for _ in zip_longest(*generations):
        continue
    assert [list(generation.completion.tokens) for generation in generations] == expected
    assert sorted(generation.completion.stats.cached_tokens for generation in generations)[:2] == [0, 0]
    assert list(greedy(engine, IDS, 8).tokens) == expected[0]


@pytest.mark.parametrize("error, prefix_cache", [(KeyboardInterrupt, 43), (RuntimeError, 43)])
@pytest.mark.parametrize("at", [1, 44])
def test_a_step_that_is_broken_off(engine, error, prefix_cache, at):
    """What is whole is kept, whatever it was."""
    plain = engine.runner.model.experts.experts
    expected = anew(engine, IDS, 9)
    engine.runner.model.experts = CountedExperts(plain, error("stop"), at)
    with pytest.raises(error):
        greedy(engine, IDS, 9)
    assert len(engine.runner.prefix_cache.tokens) == (prefix_cache if at == 44 else 0)
    engine.runner.model.experts = CountedExperts(plain)
    assert list(greedy(engine, IDS, 9).tokens) == expected


def test_the_place_on_a_gpu_is_kept_and_given_up(engine):
    """There the sequence at home is the fast one: whoever comes gets it, unless somebody still works with it."""
    plain = engine.runner
    home = KVCache(engine.config, 100, torch.float32, torch.device("cpu"))
    home.reserve(100)
    place = home.storage[0][0].data_ptr()
    engine.runner = runner = GpuRunner(
        plain.model, lambda step, last: step(), lambda: None, 100, torch.float32, plain.threads, 512, home, None
    )

    def at_home(sequence):
        return sequence.storage[0][0].data_ptr() == place

    greedy(engine, IDS)
    assert greedy(engine, IDS).stats.cached_tokens == len(IDS) - 1
    assert at_home(runner.resume(IDS))
    greedy(engine, IDS)
    first = runner.sequence()
    assert at_home(first)  # what was kept there is forgotten
    assert runner.prefix_cache.take(IDS) is None
    second = runner.sequence()
    assert not at_home(second)
    runner.step([(second, IDS)])
    runner.keep(second, IDS)  # costs memory, and would be slow
    del second
    assert runner.prefix_cache.take(IDS) is None
    del first
    assert [list(greedy(engine, ids).tokens) for ids in (IDS, IDS[:9])] == [anew(engine, i, 4) for i in (IDS, IDS[:9])]


@pytest.mark.parametrize("sampling", [GREEDY, fiddler.Sampling(seed=3)])
def test_what_should_give_the_same_again_is_computed_anew(engine, sampling):
    """In fewer bits, roundings of a prompt that is read in other pieces could change it."""
    first = engine.generate(IDS, sampling, 4)
    rows(engine)
    assert engine.generate(IDS, sampling, 4).tokens == first.tokens
    assert rows(engine) == len(IDS) + 3
    engine.generate(IDS, fiddler.Sampling(), 1)
    assert rows(engine) == 1


def test_what_was_read_of_a_prompt_that_was_given_up_is_kept(engine, monkeypatch):
    monkeypatch.setattr(engine.runner, "chunk", 8)
    ids, read = list(range(100, 150)), []

    def give_up(count):
        read.append(count)
        if count == 16:
            raise ValueError("given up")

    with pytest.raises(ValueError, match="given up"):
        list(engine.start(ids, GREEDY, 4, reuse=True, on_chunk=give_up))
    assert read == [8, 16]
    assert greedy(engine, ids).stats.cached_tokens == 16
