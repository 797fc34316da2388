"""Arguments of the Python API: each wrong type is one `RequestError` that names it, and what is meant is taken."""

import gc
import weakref

import numpy as np
import pytest
import torch

import fiddler
from fiddler.errors import RequestError
from fiddler.generation.beam_hypotheses import BeamOptions

GREEDY = fiddler.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu", context=200)


def test_a_single_stop_string_is_one_text_not_its_letters(engine):
    full = engine.generate("Once upon a time", GREEDY, 30).text
    assert "E" in full
    assert engine.generate("Once upon a time", GREEDY, 30, stop="END").text == full
    word = full.split()[5]
    assert engine.generate("Once upon a time", GREEDY, 30, stop=word).text == full[: full.index(word)]
    assert fiddler.Request("a", stop="END").stop == ("END",)


@pytest.mark.parametrize(
    "ids", [[1, 300], (1, 300), np.array([1, 300]), torch.tensor([1, 300]), [np.int64(1), torch.tensor(300)]]
)
def test_whole_numbers_of_any_kind_are_token_ids(engine, ids):
    assert torch.equal(engine.logits(ids), engine.logits([1, 300]))
    assert engine.generate(ids, GREEDY, 3).tokens == engine.generate([1, 300], GREEDY, np.int64(3)).tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.generate(b"Once", GREEDY, 3), "the prompt is bytes b'Once'; give a text or token ids"),
        (lambda e: e.logits("12"), "ids is str '12'; give token ids"),
        (lambda e: e.generate([1.7, 2.2], GREEDY, 3), "the prompt has 1.7 for a token id"),
        (lambda e: e.generate(torch.tensor([1.0]), GREEDY, 3), "the prompt has 1.0 for a token id"),
        (lambda e: e.generate([[1, 2]], GREEDY, 3), r"the prompt has \[1, 2\] for a token id"),
        (lambda e: e.generate(torch.tensor([[1, 2]]), GREEDY, 3), r"the prompt has \[1, 2\] for a token id"),
        (lambda e: e.generate([True], GREEDY, 3), "the prompt has True for a token id"),
        (lambda e: e.generate(["a", "b"], GREEDY, 3), "several texts are for `batch`"),
        (lambda e: e.generate([{"role": "user", "content": "x"}]), "messages are for fiddler.Chat"),
        (lambda e: e.generate({1: 2}, GREEDY, 3), "the prompt is {1: 2}"),
        (lambda e: e.generate(7, GREEDY, 3), "the prompt is 7"),
        (lambda e: e.generate(None, GREEDY, 3), "the prompt is None"),
        (lambda e: e.generate("a", {"temperature": 0}, 3), "sampling is {'temperature': 0}; give a fiddler.Sampling"),
        (lambda e: e.generate("a", GREEDY, "3"), "max_tokens is '3'; it must be a whole number"),
        (lambda e: e.generate("a", GREEDY, 3.0), "max_tokens is 3.0; it must be a whole number"),
        (lambda e: e.generate("a", GREEDY, True), "max_tokens is True"),
        (lambda e: e.generate("a", GREEDY, 3, stop=b"END"), "stop is b'END'"),
        (lambda e: e.generate("a", GREEDY, 3, stop=7), "stop is 7"),
        (lambda e: e.generate("a", GREEDY, 3, stop=["a", 7]), "stop has 7"),
        (lambda e: e.generate("a", GREEDY, 3, stop=["a", ""]), "a stop string is empty"),
        (lambda e: e.generate("a", GREEDY, 3, stop=""), "a stop string is empty"),
        (lambda e: e.generate("a", GREEDY, 3, constraint="root ::= 'a'"), "make one with fiddler.Constraint"),
        (lambda e: e.generate("a", GREEDY, 3, ignore_eos="no"), "ignore_eos is 'no'; give True or False"),
        (lambda e: e.start("a"), "the request is 'a'; give a fiddler.Request"),
        (lambda e: e.batch("ab"), "requests are 'ab'; give a list"),
        (lambda e: e.batch(7), "requests are 7"),
        (lambda e: e.batch(["a"], 2), "sampling is 2"),
        (lambda e: e.batch(["a"], parallel="2"), "parallel is '2'"),
        (lambda e: e.beam_search("a", "4"), "'4' beams; give a whole number"),
        (
            lambda e: e.start_beams(fiddler.Request("a", constraint=fiddler.Constraint("")), BeamOptions(2)),
            "constraint",
        ),
        (lambda e: fiddler.load(context="4096"), "context is '4096'; it must be a whole number"),
        (lambda e: fiddler.load(threads=2.0), "threads is 2.0; it must be a whole number"),
        (lambda e: fiddler.load(gpu_memory=1.5e9), "gpu_memory is 1500000000.0; it must be a whole number"),
        (lambda e: fiddler.load(7), "the model is 7; give the path"),
        (lambda e: fiddler.Chat(e).send([{"role": "user", "content": "x"}]), "give a text"),
        (lambda e: fiddler.Chat(e, system=7), "the system message is 7"),
        (lambda e: e.tokenizer.encode(7), "7"),
        (lambda e: e.tokenizer.decode("12"), "a token id is '1'"),
        (lambda e: e.tokenizer.decode([1.5]), "1.5"),
    ],
)
def test_a_value_of_another_type_is_one_request_error(engine, call, message):
    with pytest.raises(RequestError, match=message) as error:
        call(engine)
    assert "\n" not in str(error.value)


def test_batch_takes_texts_ids_and_requests_and_one_that_cannot_run_fails_alone():
    engine = fiddler.load(device="cpu", context=200, precision="exact")  # the same text, alone and beside others
    requests = ["Once upon a time", [1, 300], fiddler.Request("A cat", GREEDY, 2), "long " * 300, [1.5], [10**9]]
    outcomes = dict(engine.batch(requests, GREEDY, 4, ignore_eos=True))
    assert sorted(outcomes) == list(range(6))
    texts = [engine.generate(requests[i], GREEDY, 4, ignore_eos=True).text for i in (0, 1)]
    assert [outcomes[i].text for i in (0, 1)] == texts
    assert len(outcomes[2].tokens) == 2
    for index, message in ((3, "exceed the context of 200"), (4, "1.5"), (5, "outside the vocabulary")):
        assert isinstance(outcomes[index], RequestError)
        assert message in str(outcomes[index])


def test_names_of_control_tokens_are_read_only_where_special_asks(engine):
    eos = engine.tokenizer.token(engine.tokenizer.eos_id)
    plain = engine.start(fiddler.Request(f"a{eos}b", GREEDY, 1)).prompt
    special = engine.start(fiddler.Request(f"a{eos}b", GREEDY, 1, special=True)).prompt
    assert engine.tokenizer.eos_id not in plain
    assert engine.tokenizer.eos_id in special


def test_a_closed_engine_frees_its_model_and_says_that_it_is_closed():
    with fiddler.load(device="cpu", context=100) as engine:
        assert repr(engine).startswith("Engine('stories-18m.gguf', device='cpu', context=100, backend='")
        engine.generate("Once", GREEDY, 2)
        runner, file = weakref.ref(engine.runner), weakref.ref(engine.model_file)
    gc.collect()
    assert runner() is None
    assert file() is None
    assert repr(engine) == "Engine(closed)"
    engine.close()
    for call in (lambda: engine.generate("a"), lambda: engine.logits([1]), lambda: list(engine.batch(["a"]))):
        with pytest.raises(RequestError, match="the engine is closed; load the model again"):
            call()
    assert engine.tokenizer.decode(engine.tokenizer.encode("Once")) == "Once"
