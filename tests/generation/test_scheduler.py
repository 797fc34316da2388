"""Batches: tables of their pure decisions; and each sequence generates the text that it generates alone."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, strategies as st

import fiddler
from fiddler import Sampling
from fiddler.cost_curve import Curve
from fiddler.errors import FileFormatError, RequestError, ResourceError
from fiddler.generation.batch_size import BatchSize, batch_size, first_batch_size
from fiddler.generation.drivers import run_all
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.generation.sequence_step import tokens_per_sequence
from fiddler.host_memory import memory_for_sequences
from fiddler.runtime.paged_runner import PagedRunner
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
        (0, 5, None),  # the available memory is unknown
        (100, 0, 50),
        (100, 40, 30),
        (100, 87, 6),  # the file takes all but 13 bytes
        (100, 100, 6),  # 100 // 16
        (100, 1000, 6),
    ],
)
def test_sequences_get_half_of_the_memory_beside_the_weights_and_at_least_a_sixteenth(available, weights, room):
    assert memory_for_sequences(available, weights) == room


@pytest.mark.parametrize("experts, used, batch_size", [(8, 2, 32), (4, 4, 8), (128, 8, 128), (5, 2, 20), (3, 2, 12)])
def test_at_the_first_batch_size_each_expert_is_chosen_eight_times_a_step(experts, used, batch_size):
    assert first_batch_size(experts, used) == batch_size


@pytest.mark.parametrize(
    "missing, max_tokens, expected",
    [
        ([], 8, []),
        ([1, 1, 1], 8, [1, 1, 1]),
        ([5], 8, [5]),
        ([20], 8, [8]),
        ([1, 20, 1], 8, [1, 6, 1]),
        ([3, 4, 5], 8, [3, 4, 1]),
        ([9, 4, 1], 8, [7, 0, 1]),  # the last one decodes, the second one waits
        ([1, 1, 1, 7], 3, [1, 1, 1, 0]),
        ([1, 1, 1, 7], 2, [1, 1, 1, 0]),
    ],
)
def test_decoding_sequences_get_a_token_each_and_prompts_get_the_rest_of_a_step_in_order(missing, max_tokens, expected):
    assert tokens_per_sequence(missing, max_tokens) == expected


def slow(curve, maximum, share):
    """`Curve.efficient` by its definition: all numbers of tokens are tried."""
    speeds = {count: count / curve(count) for count in range(1, maximum + 1)}
    return min(count for count, speed in speeds.items() if speed >= share * max(speeds.values()) * (1 - 1e-9))


@given(
    seconds=st.lists(st.floats(1e-3, 10), min_size=4, max_size=4),
    maximum=st.integers(1, 300),
    share=st.sampled_from([0.5, 0.9, 0.95, 1.0]),
)
def test_an_efficient_step_has_the_fewest_tokens_that_give_nearly_the_best_speed(seconds, maximum, share):
    curve = Curve((1, 8, 64, 256), tuple(sorted(seconds)))
    assert curve.efficient(maximum, share) == slow(curve, maximum, share)


def test_a_batch_is_as_large_as_the_costs_of_steps_make_worth_while():
    curve = Curve((1, 32, 128, 512), (1.0, 1.2, 2.0, 8.0))  # 27, 64 and 64 tokens a second
    assert batch_size(None, 512, 8, 2, curve).now == curve.efficient(512) == 116
    assert batch_size(None, 100, 8, 2, curve).now == slow(curve, 100, 0.95)
    assert batch_size(None, 512, 8, 2, None).now == 32  # unknown costs
    assert batch_size(None, 512, 128, 8, Curve((1, 512), (1.0, 512.0))).now == 128  # no less than reads each expert
    assert batch_size(7, 512, 8, 2, curve).now == 7
    assert batch_size(700, 512, 8, 2, None).now == 512


def test_a_batch_stays_within_its_limit_of_at_least_one_sequence():
    size = BatchSize(16)
    for limit, expected in ((20, 16), (5, 5), (8, 5), (0, 1)):
        size.limit(limit)
        assert size.now == expected
    assert size.maximum == 16


def ragged(engine, temperature):
    """Prompts and ends of all lengths, so that sequences join and leave at many steps."""
    for n, prompt in enumerate(PROMPTS):
        stop = ["and", "!"] if n == 3 else []
        yield engine.start(
            Request(prompt, Sampling(temperature, seed=n), (7 * n) % 23 + 1, stop=stop, ignore_eos=n % 2 == 0)
        )


@pytest.fixture(scope="module", params=[0.0, 1.0])
def alone(request, demo):
    """A temperature, and the completion of each generation by itself at it."""
    completions = []
    for generation in ragged(demo, request.param):
        for _ in generation:
            continue
        completions.append(generation.completion)
    return request.param, completions


@pytest.mark.parametrize("parallel", [None, 3])
def test_a_sequence_in_a_batch_generates_what_it_generates_alone(demo, alone, parallel):
    temperature, expected = alone
    steps = []

    def on_step(*progress):
        steps.append(progress)

    completions = dict(demo.batch(ragged(demo, temperature), parallel=parallel, on_step=on_step))
    assert completions.keys() == set(range(len(PROMPTS)))
    for index, single in enumerate(expected):
        batched = completions[index]
        assert (batched.text, batched.tokens, batched.finish_reason) == (
            single.text,
            single.tokens,
            single.finish_reason,
        )
        assert batched.stats.prompt_tokens == single.stats.prompt_tokens
    assert max(sequences for _, sequences in steps) == (parallel or len(PROMPTS))
    assert steps[-1][0] == sum(len(single.tokens) for single in expected)


class RecordingRunner(PagedRunner):
    """Records the tokens of each step; a step of more than `max_sequences` sequences raises `ResourceError`."""

    def __init__(self, runner, chunk=512, max_sequences=100):
        super().__init__(runner.model, runner.context, runner.cache_dtype, runner.threads, chunk)
        self.max_sequences, self.steps = max_sequences, []

    def step(self, parts, wanted=None, **options):
        if len(parts) > self.max_sequences:
            raise ResourceError(f"no room for {len(parts)}")
        self.steps.append([len(tokens) for _, tokens in parts])
        return super().step(parts, wanted, **options)


def run_batch(engine, runner, prompts, max_tokens, kv_bytes=None, batch_size=16):
    generations = (
        engine.start(Request(prompt, Sampling(1.0, seed=5), max_tokens, ignore_eos=True)) for prompt in prompts
    )
    scheduler = Scheduler(runner, BatchSize(batch_size), kv_bytes)
    return dict(run_all(scheduler, generations, lambda generated, sequences: None))


def test_a_long_prompt_is_read_in_chunks_while_other_sequences_decode(demo):
    runner = RecordingRunner(demo.runner, chunk=20)
    completions = run_batch(demo, runner, [PROMPTS[0], PROMPTS[6]], 12)
    long, short = (len(demo.tokenizer.encode(PROMPTS[n], add_bos=True)) for n in (6, 0))
    assert long > 80
    assert runner.steps[0] == [short, 20 - short]
    assert all(step[0] == 1 and sum(step) == 20 for step in runner.steps[1:4])
    assert completions[0].tokens == demo.generate(PROMPTS[0], Sampling(1.0, seed=5), 12, ignore_eos=True).tokens
    assert completions[1].tokens == demo.generate(PROMPTS[6], Sampling(1.0, seed=5), 12, ignore_eos=True).tokens


def test_where_memory_runs_out_fewer_sequences_run_and_no_token_is_lost(demo):
    """Sequences that must wait have generated tokens by then: these are read again, and the text goes on as before."""
    prompts = [f"The {n} cats" for n in range(7)]
    runner = RecordingRunner(demo.runner)
    expected = [demo.generate(p, Sampling(1.0, seed=5), 10, ignore_eos=True).tokens for p in prompts]
    generations = (demo.start(Request(p, Sampling(1.0, seed=5), 10, ignore_eos=True)) for p in prompts)
    steps = []

    def on_step(generated, sequences):
        steps.append(sequences)
        if len(steps) == 4:
            runner.max_sequences = 3

    completions = dict(run_all(Scheduler(runner, BatchSize(7)), generations, on_step))
    assert steps[:4] == [7] * 4
    assert max(steps[4:]) == 3
    assert [completions[index].tokens for index in range(7)] == expected


def test_each_sequence_fails_if_not_even_one_fits_and_all_run_if_one_does(demo):
    runner = RecordingRunner(demo.runner, max_sequences=0)
    outcomes = run_batch(demo, runner, PROMPTS[:3], 4)
    assert all("no room for 1" in str(outcomes[index]) for index in range(3))
    runner.max_sequences = 1
    assert all(len(completion.tokens) == 4 for completion in run_batch(demo, runner, PROMPTS[:3], 4).values())


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_kv_caches_stay_within_their_memory(demo, sequences):
    runner = RecordingRunner(demo.runner)
    for positions in (5, 300):
        sequence = runner.sequence(positions)
        sequence.reserve(positions)
        assert runner.kv_bytes(positions) == len(sequence.blocks) * runner.pool.memory[0].nbytes
    del sequence
    bytes_each = runner.kv_bytes(5)
    assert len(run_batch(demo, runner, [[1, 40, 50]] * 5, 2, kv_bytes=sequences * bytes_each + bytes_each // 2)) == 5
    assert max(len(step) for step in runner.steps) == sequences
    assert len(run_batch(demo, runner, [[1, 40, 50]] * 2, 2, kv_bytes=0)) == 2  # one sequence is always admitted


def test_logits_of_nan_are_the_error_of_one_prompt_only(tmp_path):
    path = write_random_mixtral(tmp_path / "hurt.gguf")
    reader = gguf.GGUFReader(path, "r+")
    embedding = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight").data
    embedding.view("uint16").reshape(-1, 64)[300] = 0x7FC0  # a NaN
    embedding.flush()
    engine = fiddler.load(path, device="cpu")
    outcomes = dict(
        engine.batch(engine.start(Request(ids, GREEDY, 5, ignore_eos=True)) for ids in ([1, 40], [1, 300, 41], [1, 50]))
    )
    with pytest.raises(FileFormatError) as single:
        engine.generate([1, 300, 41], GREEDY, 5)
    assert isinstance(outcomes[1], FileFormatError)
    assert str(outcomes[1]) == str(single.value)
    for index, ids in ((0, [1, 40]), (2, [1, 50])):
        assert outcomes[index].tokens == engine.generate(ids, GREEDY, 5, ignore_eos=True).tokens


def test_an_empty_batch_and_zero_tokens_are_accepted_and_parallel_0_is_refused(demo):
    assert dict(demo.batch([])) == {}
    completions = dict(
        demo.batch([demo.start(Request("One", GREEDY, 0)), demo.start(Request("One", GREEDY, 2, ignore_eos=True))])
    )
    assert (completions[0].text, completions[0].finish_reason) == ("", "length")
    assert len(completions[1].tokens) == 2
    with pytest.raises(RequestError, match="parallel is 0"):
        demo.batch([], parallel=0)


def test_generations_are_started_only_when_a_sequence_has_ended(demo):
    started = []

    def generations():
        for n in range(9):
            started.append(n)
            yield demo.start(Request("One", GREEDY, 3, ignore_eos=True))

    running = demo.batch(generations(), parallel=2)
    next(running)
    assert len(started) <= 3
    assert len(list(running)) == 8


def test_a_constraint_that_fails_ends_its_own_generation_only(demo):
    class FailingGuide:
        """A guide that allows every token once and then fails."""

        calls = 0

        @property
        def finished(self):
            if self.calls:
                raise RequestError("the constraint cannot be followed")
            return False

        def allowed(self):
            self.calls += 1
            return np.ones(demo.config.vocab_size, bool)

        def advance(self, token):
            pass

    bad, good = (demo.start(Request(prompt, GREEDY, 5)) for prompt in ("Once", "A cat"))
    bad._new_sampler = lambda: Sampler(GREEDY, guide=FailingGuide())
    outcomes = dict(demo.batch([bad, good], parallel=2))
    assert "cannot be followed" in str(outcomes[0])
    assert outcomes[1].text == demo.generate("A cat", GREEDY, 5).text
