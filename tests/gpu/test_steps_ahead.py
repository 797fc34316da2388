"""Greedy steps that the GPU begins before their token is known: the same logits as without. Some need a GPU."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fiddler
from fiddler.device import cuda_driver
from fiddler.generation.request import Request
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.gpu.runner import largest_of
from fiddler.kernels.one_token import Signal
from fiddler.sampling import sampler
from fiddler.telemetry.expert_counts import ExpertCounts
from fiddler.telemetry.recorder import SILENT
from oracles.gpu_in_place import engine_in_place
from oracles.synthetic import write_random_mixtral

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GREEDY = fiddler.Sampling(temperature=0.0)
VOCABULARY = 50


class Queue:
    """Implements `Graphs` of a model whose logits depend on all tokens in its memory, which `table` names.

    Like a GPU it runs what is queued in order, and keeps the logits of the last two steps only.
    """

    breaks = ()

    def __init__(self):
        self.hidden, self.memory, self.ahead = torch.zeros(1, 1), {}, 0
        self._steps, self._token, self._position, self._next = [], 0, 0, [None, None]
        self._chosen = [None, None]

    def launch(self, token, position, table):
        self._run(token, position, table)

    def begin_ahead(self, position, table):
        assert position == self._position
        self.ahead += 1
        self._run(self._token, self._position, table)

    def _run(self, token, position, table):
        self.memory[table[position // 4], position % 4] = token
        self._chosen[position % 2] = token
        history = [self.memory[table[at // 4], at % 4] for at in range(position + 1)]
        logits = expected_logits(history)
        self._steps = [*self._steps[-1:], logits]
        self._token, self._position = int(logits.argmax()), position + 1
        self._next[position % 2] = self._token

    def logits(self, ahead=0):
        logits, self._steps[-1 - ahead] = self._steps[-1 - ahead], None
        assert logits is not None, "the logits of a step are read once"
        return logits

    def next_token(self, position):
        return self._next[position % 2]

    def chosen_at(self, position):
        """Each token chooses the expert with its own number."""
        return torch.tensor([[self._chosen[position % 2]]])


def expected_logits(history):
    numbers = np.random.default_rng([len(history), *history])
    return torch.from_numpy(numbers.normal(size=(1, VOCABULARY)).astype(np.float32))


def test_any_mixture_of_right_and_wrong_guesses_gives_each_sequence_its_own_logits():
    numbers, queue = random.Random(3), Queue()
    decoder = DecodeGraphs(queue, None, SILENT)
    tables = [np.array([1, 5, 2, 9]), np.array([3, 7, 4, 8])]
    tokens, right, i = [[7], [9]], 0, 0
    for _ in range(3000):
        i = (i + (numbers.random() < 0.03)) % 2
        if len(tokens[i]) > 14 or numbers.random() < 0.01:
            tokens[i] = tokens[i][: numbers.randrange(1, 4)]
        history = tokens[i]
        decoder.step(history[-1], len(history) - 1, tables[i], greedy=numbers.random() < 0.95)
        logits = decoder.logits()
        assert torch.equal(logits, expected_logits(history))
        likely = int(logits.argmax())
        assert decoder.largest in (None, likely)
        history.append(likely if numbers.random() < 0.95 else numbers.randrange(VOCABULARY))
        right += history[-1] == likely
    assert right > 1500
    assert queue.ahead > 1000


def test_a_step_that_was_begun_ahead_is_not_taken_once_others_may_have_written_to_its_blocks():
    """As where the sequence waited, others computed a prompt in its last block, and it got the same block again."""
    queue, table = Queue(), np.array([1, 5])
    decoder = DecodeGraphs(queue, None, SILENT)
    tokens = [7, 8, 9, 10]
    for position, token in enumerate(tokens):
        decoder.step(token, position, table, greedy=position == 3)
        logits = decoder.logits()
        assert torch.equal(logits, expected_logits(tokens[: position + 1]))
    tokens.append(int(logits.argmax()))
    assert queue.ahead == 1
    queue.memory[5, 0] = 49
    decoder.forget_ahead()
    for position in (4, 5):
        decoder.step(tokens[position], position, table)
        assert torch.equal(decoder.logits(), expected_logits(tokens[: position + 1]))
        tokens.append(3)


def test_a_runner_takes_no_step_ahead_after_a_prompt_or_a_sequence_that_is_resumed(tmp_path):
    runner, calls = engine_in_place(write_random_mixtral(tmp_path / "tiny.gguf")).runner, []
    runner._decoder = SimpleNamespace(forget_ahead=lambda: calls.append("forgotten"))
    sequence = runner.resume([5, 6, 7])
    assert len(calls) == 1
    runner.step([(sequence, [5, 6, 7])])
    assert len(calls) == 2


def test_no_step_is_begun_ahead_where_the_caller_draws():
    queue = Queue()
    decoder = DecodeGraphs(queue, None, SILENT)
    decoder.step(3, 0, np.array([1]))
    assert torch.equal(decoder.logits(), expected_logits([3]))
    assert queue.ahead == 0


def test_experts_are_counted_once_a_step_also_where_the_next_one_is_begun_ahead_or_no_logits_are_read():
    queue, counts = Queue(), ExpertCounts(1, VOCABULARY)
    decoder, tokens = DecodeGraphs(queue, None, counts), [7]
    for position in range(12):
        decoder.step(tokens[-1], position, np.array([1, 5, 2, 9]), greedy=position % 3 != 0)
        if position % 3 == 0 and position % 2:
            decoder.without_logits()
        else:
            decoder.logits()
        tokens.append(int(expected_logits(tokens).argmax()))
    assert queue.ahead == 8
    assert counts.counts == [np.bincount(tokens[:-1], minlength=VOCABULARY).tolist()]


@pytest.mark.parametrize(
    "options, greedy",
    [
        ({}, True),
        ({"top_k": 3, "seed": 1, "n_probs": 2}, True),
        ({"temperature": 0.1}, False),
        ({"repeat_penalty": 1.1}, False),
        ({"presence_penalty": 0.5}, False),
        ({"frequency_penalty": -0.5}, False),
        ({"dry_multiplier": 0.8, "dry_sequence_breakers": []}, False),
        ({"logit_bias": {3: float("-inf")}}, True),
        ({"logit_bias": {3: float("-inf"), 5: 1.0}}, False),
    ],
)
def test_a_sampler_is_greedy_where_it_takes_the_largest_of_the_models_logits(options, greedy):
    assert sampler.Sampler(fiddler.Sampling(**{"temperature": 0.0} | options)).greedy is greedy


def test_a_token_that_the_model_prefers_and_a_ban_forbids_costs_few_steps():
    queue = Queue()
    decoder = DecodeGraphs(queue, None, SILENT)
    tokens = [7]
    for position in range(14):
        decoder.step(tokens[-1], position, np.array([1, 5, 2, 9]), greedy=True)
        logits = decoder.logits()
        assert torch.equal(logits, expected_logits(tokens))
        tokens.append((int(logits.argmax()) + 1) % VOCABULARY)
    assert queue.ahead == 2


def test_the_largest_logits_of_a_step_are_numpys_first_ones():
    numbers = np.random.default_rng(0)
    logits = numbers.integers(0, 30, (40, 1000)).astype(np.float32)
    bad = {3: np.nan, 17: np.inf, 20: -np.inf}
    for row, value in bad.items():
        logits[row, numbers.integers(1000)] = value
    expected = [-1 if row in bad else int(logits[row].argmax()) for row in range(40)]
    assert largest_of(torch.from_numpy(logits)).tolist() == expected
    if torch.cuda.is_available():
        assert largest_of(torch.from_numpy(logits).cuda()).tolist() == expected


def test_a_greedy_sampler_takes_the_known_largest_unless_it_is_banned():
    logits = np.array([0.0, 3.0, 3.0, 1.0], np.float32)
    for ban, chosen in (({}, 1), ({0: float("-inf")}, 1), ({1: float("-inf")}, 2)):
        greedy = sampler.Sampler(fiddler.Sampling(temperature=0.0, logit_bias=ban, n_probs=1))
        assert greedy(logits, [5], 1) == greedy(logits, [5]) == chosen
        assert greedy.log_probs[0] == greedy.log_probs[1]
    drawn = sampler.Sampler(fiddler.Sampling(temperature=1.0, seed=0, top_k=0, top_p=1.0, min_p=0.0))
    assert {drawn(logits, [5], 1) for _ in range(300)} == {0, 1, 2, 3}


@GPU
@pytest.mark.parametrize("size", [1, 2, 31, 8192, 8193, 32000, 151936])
def test_the_next_token_is_numpys_first_largest(size):
    from fiddler.gpu import decode_kernels

    numbers, host = np.random.default_rng(0), torch.zeros(2, dtype=torch.int64, pin_memory=True)
    for levels in (3, 1 << 20):  # many equal ones, few
        for position in (0, 1, 4095):
            logits = torch.from_numpy(numbers.integers(0, levels, (1, size)).astype(np.float32) - 2)
            token = torch.tensor([5, position], device="cuda")
            decode_kernels.next_token(logits.cuda(), token, host)
            torch.cuda.synchronize()
            chosen = int(logits[0].numpy().argmax())
            assert token.tolist() == [chosen, position + 1]
            assert host[position % 2] == chosen
    for value in (float("nan"), float("-inf"), float("inf")):
        one = torch.zeros(1, size)
        one[0, numbers.integers(size)] = value
        for logits in (torch.full((1, size), value), one):
            token = torch.tensor([5, 0], device="cuda")
            decode_kernels.next_token(logits.cuda(), token, host)
            assert 0 <= token[0].item() < size
            assert host[0] == -1


@GPU
@pytest.mark.parametrize(
    "precision,residents,display",
    [("exact", None, False), ("fast", None, False), ("exact", 20, False), ("exact", 20, True)],
)
def test_greedy_texts_are_the_same_with_and_without_steps_ahead(precision, residents, display, monkeypatch):
    """Beside sampled ones, ones that are given up, and cached prefixes; over block boundaries and to the end.

    Where the CPU computes some experts, sums are rounded differently each time; in `exact` no choice here notices. In
    `fast`, a prompt that is read in one step is rounded otherwise than one whose beginning is cached: both are cached.
    """
    from fiddler.gpu.stream_wait_graphs import StreamWaitGraphs

    monkeypatch.setattr(cuda_driver, "ends_long_kernels", lambda device: display)
    engine = fiddler.load(device="cuda", precision=precision, context=128, gpu_experts=residents)
    decoder = engine.runner._decoder
    assert isinstance(decoder._graphs, StreamWaitGraphs) is display
    assert (max(decoder._graphs.pieces, default=1) > 1) is (residents is not None and not display)
    if residents is not None:  # the numbers overflow soon
        signals = decoder._graphs._streamed.signals
        signals._next = last = 2**32 - 50
        for signal in Signal:
            of_chunk = signal in (Signal.SENT, Signal.COMPUTED)
            signals.set(signal, signals.chunk(last, 0) - 1 if of_chunk else last - 1)
    assert decoder.uses_cpu is (residents is not None)
    prompts = ["Once upon a time, in a small village", "The", "Two plus two is", "It was a dark night; " * 6]
    begun, begin_ahead = [], decoder._graphs.begin_ahead
    monkeypatch.setattr(decoder._graphs, "begin_ahead", lambda *step: (begun.append(1), begin_ahead(*step)))

    def texts():
        results = []
        for prompt in prompts * 2:
            results.append(engine.generate(prompt, GREEDY, 128 - len(engine.tokenizer.encode(prompt, True))).tokens)
            pieces = iter(engine.start(Request(prompt, GREEDY, 40)))
            next(pieces), next(pieces)  # given up
            results.append(engine.generate(prompt, fiddler.Sampling(seed=3), 20).tokens)
        return results

    if precision == "fast":
        texts()
    with_ahead = texts()
    assert len(begun) > 300
    monkeypatch.setattr(sampler, "_is_greedy", lambda sampling: False)
    before = len(begun)
    assert texts() == with_ahead
    assert len(begun) == before
