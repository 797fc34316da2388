"""The demo model that ships: its greedy text and loss equal those of transformers, and all its experts are in use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fiddler
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.telemetry.expert_counts import ExpertCounts
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
def transformers_model():
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
def test_greedy_text_of_the_demo_model_is_that_of_transformers(exact, transformers_model, prompt):
    ids = exact.tokenizer.encode(prompt, add_bos=True)
    expected = transformers_model.generate(
        torch.tensor([ids]), do_sample=False, max_new_tokens=100, eos_token_id=exact.tokenizer.eos_id, pad_token_id=0
    )
    ours = exact.generate(prompt, fiddler.Sampling(temperature=0.0), 100)
    assert list(ours.tokens) == expected[0, len(ids) :].tolist()
    assert ours.text == exact.tokenizer.decode(expected[0].tolist()).removeprefix(prompt)


@pytest.mark.parametrize(("precision", "bound"), [("exact", 1e-4), ("fast", 1.5e-2)])
def test_logits_and_loss_on_held_out_text_match_transformers(transformers_model, heldout, precision, bound):
    """Where a rounding flips an expert, too: on a trained model that costs little."""
    engine = fiddler.load(precision=precision)
    window = [engine.tokenizer.bos_id, *heldout[:500]]
    with torch.inference_mode():
        expected = transformers_model(torch.tensor([window])).logits[0]
    actual = engine.logits(window)
    assert float((actual - expected).norm() / expected.norm()) < bound
    targets = torch.tensor(window[1:])
    ours, reference = (float(F.cross_entropy(logits[:-1], targets)) for logits in (actual, expected))
    assert abs(ours - reference) < bound
    assert reference < 2.5, "perplexity beyond 12: not the trained model"


def test_every_expert_gets_3_to_40_percent_of_the_held_out_tokens(heldout):
    config = ModelFile.open(DEMO_MODEL).config
    recorder = ExpertCounts(config.block_count, config.expert_count)
    engine = fiddler.load(recorder=recorder)
    for begin in range(0, 8000, 1000):
        engine.logits([engine.tokenizer.bos_id, *heldout[begin : begin + 1000]])
    counts = torch.tensor(recorder.counts)
    fraction = counts / counts.sum(1, keepdim=True)
    assert float(fraction.min()) >= 0.03
    assert float(fraction.max()) <= 0.40


def test_generated_text_has_known_words_and_does_not_loop():
    """Nine words of ten occur in the held-out text; whether the sentences make sense is for a reader to judge."""
    vocabulary = set(WORD.findall(HELDOUT.read_text(encoding="utf-8").lower()))
    engine = fiddler.load()
    for seed in range(5):
        text = engine.generate("Once upon a time", fiddler.Sampling(temperature=0.7, seed=seed), 120).text
        words = WORD.findall(text.lower())
        assert len(words) > 40
        assert sum(word in vocabulary for word in words) >= 0.9 * len(words)
        fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        assert len(set(fours)) >= 0.85 * len(fours)
