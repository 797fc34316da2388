"""The model that ships, against transformers: the same greedy text, the same loss, experts that are all in use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler.loading import DEMO_MODEL
from oracles.reference import from_gguf

HELDOUT = Path(__file__).parents[1] / "data" / "heldout.txt"
WORD = re.compile(r"[a-z']+")
PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "The old farmer looked at the sky and",
    "Tom had a small red boat.",
    "In the middle of the forest there lived",
    "There was a bird who could not fly.",
    "Far away, behind the mountains,",
    '"Please help me," said the mouse',
    "It was a cold winter night when",
    "The robot wanted to be",
]


@pytest.fixture(scope="module")
def theirs():
    return from_gguf(DEMO_MODEL)


@pytest.fixture(scope="module")
def heldout(exact):
    text = HELDOUT.read_text(encoding="utf-8")
    assert len(text.encode()) >= 200_000
    return exact.tokenizer.encode(text)


@pytest.fixture(scope="module")
def exact():
    return fiddler.load(precision="exact")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_transformers(exact, theirs, prompt):
    ids = exact.tokenizer.encode(prompt, add_bos=True)
    expected = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=100, eos_token_id=exact.tokenizer.eos_id, pad_token_id=0
    )
    ours = exact.generate(prompt, fiddler.Sampling(temperature=0.0), 100)
    assert list(ours.tokens) == expected[0, len(ids) :].tolist()
    assert ours.text == exact.tokenizer.decode(expected[0].tolist()).removeprefix(prompt)


@pytest.mark.parametrize(("precision", "bound"), [("exact", 1e-4), ("fast", 1.5e-2)])
def test_logits_on_held_out_text(theirs, heldout, precision, bound):
    """Flipped experts included: on a trained model they cost little."""
    engine = fiddler.load(precision=precision)
    window = [engine.tokenizer.bos_id, *heldout[:500]]
    with torch.inference_mode():
        expected = theirs(torch.tensor([window])).logits[0]
    actual = engine.logits(window)
    assert float((actual - expected).norm() / expected.norm()) < bound
    targets = torch.tensor(window[1:])
    ours, reference = (float(F.cross_entropy(logits[:-1], targets)) for logits in (actual, expected))
    assert abs(ours - reference) < bound
    assert reference < 2.5, "perplexity beyond 12: not the trained model"


class CountingExperts:
    """Passes on to the engine's experts and counts who was chosen."""

    def __init__(self, experts, layers, count):
        self.experts, self.counts = experts, torch.zeros(layers, count, dtype=torch.int64)

    def __call__(self, layer, x, ids, weights):
        self.counts[layer] += torch.bincount(ids.flatten(), minlength=self.counts.shape[1])
        return self.experts(layer, x, ids, weights)


def test_every_expert_is_in_use(heldout):
    engine = fiddler.load()
    model = engine.runner.model
    model.experts = counting = CountingExperts(model.experts, engine.config.block_count, engine.config.expert_count)
    for begin in range(0, 8000, 1000):
        engine.logits([engine.tokenizer.bos_id, *heldout[begin : begin + 1000]])
    share = counting.counts / counting.counts.sum(1, keepdim=True)
    assert float(share.min()) >= 0.03
    assert float(share.max()) <= 0.40


def test_it_reads_as_english():
    """Nine words of ten are in the held-out text, and there is no loop; sound sentences are for a reader to judge."""
    words = set(WORD.findall(HELDOUT.read_text(encoding="utf-8").lower()))
    engine = fiddler.load()
    for seed in range(5):
        text = engine.generate("Once upon a time", fiddler.Sampling(temperature=0.7, seed=seed), 120).text
        said = WORD.findall(text.lower())
        assert len(said) > 40
        assert sum(word in words for word in said) >= 0.9 * len(said)
        fours = [tuple(said[i : i + 4]) for i in range(len(said) - 3)]
        assert len(set(fours)) >= 0.85 * len(fours)
