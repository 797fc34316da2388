"""Generation on a small random model: its text, its end, and the refusal of requests before any computation."""

from __future__ import annotations

from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch

import fiddler
from fiddler import Sampling
from fiddler.engine import Engine
from fiddler.errors import FileFormatError, RequestError
from fiddler.generation.request import Request
from oracles.synthetic import write_random_mixtral

GREEDY = Sampling(temperature=0.0)
CONTEXT = 620
IDS = np.random.default_rng(3).integers(3, 512, 600).tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("generate") / "tiny.gguf", context=CONTEXT)


@pytest.fixture(scope="module")
def engine(path):
    return fiddler.load(path)


def test_greedy_is_the_argmax_of_a_rescore(path):
    exact = fiddler.load(path, precision="exact")
    prompt = exact.tokenizer.encode("The bridge", add_bos=True)
    tokens = exact.generate("The bridge", GREEDY, 12, ignore_eos=True).tokens
    logits = exact.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    logits[:, sorted(exact.tokenizer.end_ids)] = -torch.inf
    assert tuple(logits.argmax(-1).tolist()) == tokens


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, 0, 1.0, 0.0, 1.3, seed=6)])
def test_streamed_pieces_are_the_text_of_generate(engine, sampling):
    completion = engine.generate("The river", sampling, 16)
    pieces = list(engine.stream("The river", sampling, 16))
    assert "".join(pieces) == completion.text
    assert all(pieces)
    assert engine.tokenizer.decode(completion.tokens, continuing=True) == completion.text


def test_a_prompt_of_ids_gets_no_bos_token(engine):
    ids = engine.tokenizer.encode("The river", add_bos=True)
    assert ids[0] == engine.tokenizer.bos_id
    assert engine.generate(ids, GREEDY, 4).tokens == engine.generate("The river", GREEDY, 4).tokens
    assert engine.generate(ids[1:], GREEDY, 1).stats.prompt_tokens == len(ids) - 1


def test_the_name_of_a_control_token_in_a_prompt_stays_text(engine):
    eos = engine.tokenizer.token(engine.tokenizer.eos_id)
    assert engine.tokenizer.eos_id not in engine.tokenizer.encode(f"one{eos}two")
    assert engine.generate(f"one{eos}two", GREEDY, 3).stats.prompt_tokens > 4


def test_an_end_token_ends_the_generation_unless_it_is_ignored(tmp_path, engine):
    """The same weights with another end token: the first greedy token after the third that is no repetition."""
    free = engine.generate("One day", GREEDY, 12, ignore_eos=True)
    position = next(i for i in range(3, 12) if free.tokens[i] not in free.tokens[:i])
    ending = fiddler.load(write_random_mixtral(tmp_path / "ends.gguf", context=CONTEXT, eos=free.tokens[position]))
    done = ending.generate("One day", GREEDY, 12)
    assert done.finish_reason == "stop"
    assert done.tokens == free.tokens[: position + 1]
    assert done.text == ending.tokenizer.decode(free.tokens[:position], continuing=True)
    assert "".join(ending.stream("One day", GREEDY, 12)) == done.text
    ignoring = ending.generate("One day", GREEDY, 12, ignore_eos=True)
    assert ignoring.finish_reason == "length"
    assert len(ignoring.tokens) == 12
    assert ignoring.tokens[:position] == free.tokens[:position]
    assert not set(ignoring.tokens) & ending.tokenizer.end_ids


def test_a_stop_string_ends_the_text_before_it(engine):
    whole = engine.generate("The snow", GREEDY, 16, ignore_eos=True)
    middle = len(whole.text) // 2
    for stop in (whole.text[middle : middle + 3], whole.text[-1], whole.text[:1]):
        done = engine.generate("The snow", GREEDY, 16, stop=[stop, "never in the text"], ignore_eos=True)
        assert done.text == whole.text[: whole.text.index(stop)]
        assert done.finish_reason == "stop"
        assert whole.tokens[: len(done.tokens)] == done.tokens
        assert "".join(engine.stream("The snow", GREEDY, 16, stop=[stop], ignore_eos=True)) == done.text
    unfinished = whole.text[-1] + "and what never came"
    done = engine.generate("The snow", GREEDY, 16, stop=[unfinished], ignore_eos=True)
    assert (done.text, done.finish_reason) == (whole.text, "length")


def test_a_generation_ends_at_max_tokens_or_the_context_and_counts_its_tokens(engine):
    nothing = engine.generate("The snow", GREEDY, 0)
    assert (nothing.text, nothing.tokens, nothing.finish_reason) == ("", (), "length")
    done = engine.generate("The snow", GREEDY, 5, ignore_eos=True)
    assert len(done.tokens) == 5
    stats = done.stats
    assert stats.prompt_tokens == len(engine.tokenizer.encode("The snow", add_bos=True))
    assert stats.generated_tokens == 5
    assert stats.prompt_speed > 0
    assert stats.generation_speed > 0
    assert stats.peak_resident > stats.anonymous > 0
    filled = engine.generate([*IDS, *IDS[:10]], GREEDY, None, ignore_eos=True)
    assert len(filled.tokens) == CONTEXT - 610
    assert filled.finish_reason == "length"


class UnusedRunner:
    """Replaces the runner and fails when it is used: a refused request must not compute."""

    context = CONTEXT

    def __getattr__(self, name):
        raise AssertionError(f"runner.{name} was used")


@pytest.mark.parametrize(
    "request_, message",
    [
        (
            lambda e: e.start(Request([1] * 600, GREEDY, 21)),
            "600 prompt tokens and 21 new ones exceed the context of 620",
        ),
        (lambda e: e.start(Request([1] * 621)), "621 tokens exceed the context of 620"),
        (lambda e: e.start(Request([1] * 620)), "620 prompt tokens fill the context"),
        (lambda e: e.start(Request([1], GREEDY, -1)), "max_tokens is -1"),
        (lambda e: e.start(Request([])), "the prompt is empty"),
        (lambda e: e.start(Request([1, 512])), "token id 512 is outside the vocabulary of 512"),
        (lambda e: e.start(Request([-1])), "token id -1 is outside"),
        (lambda e: e.start(Request("text", stop=["a", ""])), "a stop string is empty"),
        (lambda e: e.logits([0, 10**9]), "token id 1000000000 is outside"),
        (lambda e: e.logits([0] * 621), "621 tokens exceed the context"),
        (lambda e: e.stream("text", GREEDY, 10**6), "exceed the context"),
        (lambda e: e.generate("text", GREEDY, 10**6), "exceed the context"),
    ],
)
def test_impossible_requests_are_refused_before_any_computation(engine, request_, message):
    idle = Engine(engine.model_file, engine.tokenizer, UnusedRunner(), "cpu", "CPU", engine.backend, 0.0)
    with pytest.raises(RequestError, match=message) as refused:
        request_(idle)
    assert "\n" not in str(refused.value)


def test_an_empty_prompt_is_a_bos_token_or_an_error(tmp_path, engine):
    assert engine.generate("", GREEDY, 3).stats.prompt_tokens == 1
    without = fiddler.load(write_random_mixtral(tmp_path / "no_bos.gguf", add_bos=False))
    with pytest.raises(RequestError, match="the prompt is empty"):
        without.generate("", GREEDY, 3)
    assert without.generate("x", GREEDY, 0).stats.prompt_tokens == len(engine.tokenizer.encode("x"))


def test_weights_of_nan_end_in_an_error_of_one_line(tmp_path):
    path = write_random_mixtral(tmp_path / "damaged.gguf", layers=1)
    norm = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output_norm.weight")
    with path.open("r+b") as file:
        file.seek(int(norm.data_offset))
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(FileFormatError, match="the model computes nan after 2 tokens"):
        fiddler.load(path).generate([1, 5], GREEDY, 3)


def test_two_engines_and_an_unfinished_generation_do_not_disturb_each_other(path, engine):
    """State is in the sequences: neither a second engine nor an unfinished generation disturbs the first."""
    other = fiddler.load(path)
    expected = engine.generate("The road", GREEDY, 6).tokens
    unfinished = iter(engine.start(Request("The snow", GREEDY, 15, ignore_eos=True)))
    next(unfinished)
    assert other.generate("The road", GREEDY, 6).tokens == expected
    assert engine.generate("The road", GREEDY, 6).tokens == expected
    assert "".join([*unfinished])  # and goes on


def test_streamed_text_only_grows(engine):
    """Each piece only adds to the text before it."""
    generation = engine.start(Request("The child", Sampling(1.2, seed=4), 25, ignore_eos=True))
    texts = [""]
    for piece in generation:
        texts.append(texts[-1] + piece)
    assert texts[-1] == generation.completion.text
    assert all(later.startswith(sooner) and later != sooner for sooner, later in pairwise(texts))
