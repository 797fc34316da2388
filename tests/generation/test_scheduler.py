"""Batches: who is in a step is a matter of numbers, and what each sequence says is what it says alone."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

import fiddler
from fiddler import Sampling
from fiddler.errors import FileFormatError, RequestError, ResourceError
from fiddler.generation.batch_size import BatchSize, first_batch_size, tokens_per_sequence
from fiddler.generation.scheduler import Batch
from fiddler.host_memory import memory_for_sequences
from fiddler.runtime.runner import Runner
from fiddler.sampling.sampler import Sampler
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
PROMPTS = [
    "Once upon a time",
    "One",
    "The old fiddler lived in a house by the sea, and every day he went down to the water to play for the fish. " * 2,
    "Tom and Lily went to the park. They saw a big dog. The dog was",
    "",
    "A cat",
    "Every morning the bear " * 20,
]


@pytest.fixture(scope="module")
def demo():
    return fiddler.load(device="cpu", precision="exact")


@pytest.mark.parametrize(
    "available, weights, room",
    [
        (0, 5, None),  # nothing tells
        (100, 0, 50),
        (100, 40, 30),
        (100, 87, 6),  # all but 13 bytes are the file's
        (100, 100, 6),  # 100 // 16
        (100, 1000, 6),
    ],
)
def test_memory_for_sequences(available, weights, room):
    assert memory_for_sequences(available, weights) == room


@pytest.mark.parametrize("experts, used, width", [(8, 2, 32), (4, 4, 8), (128, 8, 128), (5, 2, 20), (3, 2, 12)])
def test_the_first_width_reads_every_expert(experts, used, width):
    assert first_batch_size(experts, used) == width


@pytest.mark.parametrize(
    "lacking, most, given",
    [
        ([], 8, []),
        ([1, 1, 1], 8, [1, 1, 1]),
        ([5], 8, [5]),
        ([20], 8, [8]),
        ([1, 20, 1], 8, [1, 6, 1]),
        ([3, 4, 5], 8, [3, 4, 1]),
        ([9, 4, 1], 8, [7, 0, 1]),  # the last goes on, the second waits
        ([1, 1, 1, 7], 3, [1, 1, 1, 0]),
        ([1, 1, 1, 7], 2, [1, 1, 1, 0]),
    ],
)
def test_tokens_of_a_step(lacking, most, given):
    assert tokens_per_sequence(lacking, most) == given


@pytest.mark.parametrize(
    "most, seconds, widths",
    [
        (64, {16: 1.0, 32: 1.2, 64: 1.5}, [16, 32, 64, 64]),
        (512, {16: 1.0, 32: 1.2, 64: 2.3}, [16, 32, 64, 32, 32]),  # 64 in 2.3 s are no more than 32 in 1.2 s
        (512, {16: 1.0, 32: 1.9, 64: 1.9}, [16, 32, 16, 16]),
        (40, {16: 1.0, 32: 1.0, 40: 1.0}, [16, 32, 40, 40]),
        (16, {16: 1.0}, [16, 16]),
    ],
)
def test_a_batch_grows_as_long_as_that_pays(most, seconds, widths):
    width, seen = BatchSize(16, most), []
    for _ in widths:
        seen.append(width.now)
        for step in range(8):
            width.measured(width.now - 1, 1e-9)  # one that has not filled it counts for nothing
            width.measured(width.now, seconds[width.now] * (50 if step == 3 else 1))  # nor does a hiccup
    assert seen == widths


def test_a_batch_keeps_to_the_room_there_is():
    width = BatchSize(16, 64)
    width.limit(5)
    for _ in range(20):
        width.measured(5, 1.0)
    assert width.now == 5
    width.limit(0)
    assert width.now == 1


def ragged(engine, temperature):
    """Prompts and ends of all lengths, so that sequences join and leave at many steps."""
    for n, prompt in enumerate(PROMPTS):
        stop = ["and", "!"] if n == 3 else []
        yield engine.start(prompt, Sampling(temperature, seed=n), (7 * n) % 23 + 1, stop=stop, ignore_eos=n % 2 == 0)


@pytest.fixture(scope="module", params=[0.0, 1.0])
def alone(request, demo):
    """A temperature, and what each says by itself at it."""
    made = []
    for generation in ragged(demo, request.param):
        for _ in generation:
            continue
        made.append(generation.completion)
    return request.param, made


@pytest.mark.parametrize("parallel", [None, 3])
def test_a_sequence_says_what_it_says_alone(demo, alone, parallel):
    temperature, expected = alone
    seen = []

    def on_step(*now):
        seen.append(now)

    found = dict(demo.batch(ragged(demo, temperature), parallel, on_step=on_step))
    assert found.keys() == set(range(len(PROMPTS)))
    for place, one in enumerate(expected):
        made = found[place]
        assert (made.text, made.tokens, made.finish_reason) == (one.text, one.tokens, one.finish_reason)
        assert made.stats.prompt_tokens == one.stats.prompt_tokens
    assert max(width for _, width in seen) == (parallel or len(PROMPTS))
    assert seen[-1][0] == sum(len(one.tokens) for one in expected)


class Watched(Runner):
    """Notes the steps, and takes no more than `most` sequences or `sequences` at all."""

    def __init__(self, runner, chunk=512, most=100):
        super().__init__(runner.model, runner.context, runner.cache_dtype, runner.threads, chunk)
        self.most, self.steps = most, []

    def step(self, parts, wanted=None):
        if len(parts) > self.most:
            raise ResourceError(f"no room for {len(parts)}")
        self.steps.append([len(tokens) for _, tokens in parts])
        return super().step(parts, wanted)


def through(engine, runner, prompts, limit, room=None, width=16):
    generations = (engine.start(prompt, Sampling(1.0, seed=5), limit, ignore_eos=True) for prompt in prompts)
    return dict(Batch(runner, generations, room, BatchSize(width, width)))


def test_prompts_are_read_in_chunks_beside_which_the_others_go_on(demo):
    runner = Watched(demo.runner, chunk=20)
    made = through(demo, runner, [PROMPTS[0], PROMPTS[6]], 12)
    long, short = (len(demo.tokenizer.encode(PROMPTS[n], add_bos=True)) for n in (6, 0))
    assert long > 80
    assert runner.steps[0] == [short, 20 - short]
    assert all(step[0] == 1 and sum(step) == 20 for step in runner.steps[1:4])
    assert made[0].tokens == demo.generate(PROMPTS[0], Sampling(1.0, seed=5), 12, ignore_eos=True).tokens
    assert made[1].tokens == demo.generate(PROMPTS[6], Sampling(1.0, seed=5), 12, ignore_eos=True).tokens


def test_where_memory_runs_out_fewer_go_on_and_nothing_is_lost(demo):
    """Those that have to wait have said something by then: they read it again, and go on as if nothing had been."""
    prompts = [f"The {n} cats" for n in range(7)]
    runner = Watched(demo.runner)
    expected = [demo.generate(p, Sampling(1.0, seed=5), 10, ignore_eos=True).tokens for p in prompts]
    generations = (demo.start(p, Sampling(1.0, seed=5), 10, ignore_eos=True) for p in prompts)
    steps = []

    def scarce(generated, sequences):
        steps.append(sequences)
        if len(steps) == 4:
            runner.most = 3

    found = dict(Batch(runner, generations, None, BatchSize(7, 7), scarce))
    assert steps[:4] == [7] * 4
    assert max(steps[4:]) == 3
    assert [found[place].tokens for place in range(7)] == expected


def test_one_that_has_no_room_by_itself_fails_alone(demo):
    runner = Watched(demo.runner, most=0)
    found = through(demo, runner, PROMPTS[:3], 4)
    assert all("no room for 1" in str(found[place]) for place in range(3))
    runner.most = 1
    assert all(len(one.tokens) == 4 for one in through(demo, runner, PROMPTS[:3], 4).values())


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_keys_and_values_stay_within_their_room(demo, fits):
    runner = Watched(demo.runner)
    for positions in (5, 300):
        taken = sum(prefix_cache.nbytes for half in runner.sequence(positions).storage for prefix_cache in half)
        assert runner.kv_bytes(positions) == taken
    needs = runner.kv_bytes(5)
    assert len(through(demo, runner, [[1, 40, 50]] * 5, 2, room=fits * needs + needs // 2)) == 5
    assert max(len(step) for step in runner.steps) == fits
    assert len(through(demo, runner, [[1, 40, 50]] * 2, 2, room=0)) == 2  # one is always let in


def test_what_is_no_number_is_one_prompts_error(tmp_path):
    path = write_random_mixtral(tmp_path / "hurt.gguf")
    reader = gguf.GGUFReader(path, "r+")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").data
    embedding.view("uint16").reshape(-1, 64)[300] = 0x7FC0  # a NaN
    embedding.flush()
    engine = fiddler.load(path, device="cpu")
    found = dict(
        engine.batch(engine.start(ids, GREEDY, 5, ignore_eos=True) for ids in ([1, 40], [1, 300, 41], [1, 50]))
    )
    with pytest.raises(FileFormatError) as alone:
        engine.generate([1, 300, 41], GREEDY, 5)
    assert isinstance(found[1], FileFormatError)
    assert str(found[1]) == str(alone.value)
    for place, ids in ((0, [1, 40]), (2, [1, 50])):
        assert found[place].tokens == engine.generate(ids, GREEDY, 5, ignore_eos=True).tokens


def test_nothing_to_do(demo):
    assert dict(demo.batch([])) == {}
    found = dict(demo.batch([demo.start("One", GREEDY, 0), demo.start("One", GREEDY, 2, ignore_eos=True)]))
    assert (found[0].text, found[0].finish_reason) == ("", "length")
    assert len(found[1].tokens) == 2
    with pytest.raises(RequestError, match="parallel is 0"):
        demo.batch([], 0)


def test_generations_are_taken_when_there_is_room(demo):
    taken = []

    def generations():
        for n in range(9):
            taken.append(n)
            yield demo.start("One", GREEDY, 3, ignore_eos=True)

    running = demo.batch(generations(), 2)
    next(running)
    assert len(taken) <= 3
    assert len(list(running)) == 8


def test_a_constraint_that_fails_ends_its_own_generation_only(demo):
    class Fails:
        """A guide that allows all, once, and then knows no more."""

        asked = 0

        @property
        def finished(self):
            if self.asked:
                raise RequestError("the constraint cannot be followed")
            return False

        def allowed(self):
            self.asked += 1
            return np.ones(demo.config.vocab_size, bool)

        def advance(self, token):
            pass

    bad, good = (demo.start(prompt, GREEDY, 5) for prompt in ("Once", "A cat"))
    bad._new_sampler = lambda: Sampler(GREEDY, guide=Fails())
    outcomes = dict(demo.batch([bad, good], 2))
    assert "cannot be followed" in str(outcomes[0])
    assert outcomes[1].text == demo.generate("A cat", GREEDY, 5).text
