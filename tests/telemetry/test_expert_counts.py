"""Expert counts of the compiled decode step, of the step in torch and of transformers' router: all the same."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.telemetry.expert_counts import ExpertCounts
from fiddler.telemetry.recorder import SilentRecorder
from oracles.reference import from_gguf

PROMPT, DECODED = "Once upon a time, in a small village,", 60


@pytest.fixture(scope="module")
def ids():
    """A prompt of the demo model and its greedy continuation; all but the last token are computed."""
    engine = fiddler.load(precision="exact")
    prompt = engine.tokenizer.encode(PROMPT, add_bos=True)
    completion = engine.generate(prompt, fiddler.Sampling(temperature=0.0), DECODED, ignore_eos=True)
    return len(prompt), [*prompt, *completion.tokens[:-1]]


@pytest.fixture(scope="module")
def router_logits(ids):
    """transformers' router logits of those tokens: of each layer [T, E]."""
    with torch.inference_mode():
        return from_gguf(DEMO_MODEL)(torch.tensor([ids[1]]), output_router_logits=True, use_cache=False).router_logits


def chosen(router_logits, k):
    """How often each expert is among the first K of its router's logits, [L][E]."""
    return [torch.bincount(of.topk(k).indices.flatten(), minlength=of.shape[1]).tolist() for of in router_logits]


def counting_engine(precision):
    config = ModelFile.open(DEMO_MODEL).config
    recorder = ExpertCounts(config.block_count, config.expert_count)
    return fiddler.load(precision=precision, recorder=recorder), recorder


def read(runner, ids, prompt):
    """One step of the prompt's tokens, then one of each other token."""
    sequence = runner.sequence()
    runner.step([(sequence, ids[:prompt])])
    for token in ids[prompt:]:
        runner.step([(sequence, [token])])


@pytest.mark.parametrize("way", ["compiled", "torch"])
def test_counts_of_a_prompt_and_decoded_tokens_are_those_of_transformers_router(ids, router_logits, way, monkeypatch):
    prompt, tokens = ids
    engine, recorder = counting_engine("exact")
    assert engine.runner._decoder is not None
    if way == "torch":
        monkeypatch.setattr(engine.runner, "_decoder", None)
    read(engine.runner, tokens, prompt)
    layers, k = engine.config.block_count, engine.config.expert_used_count
    assert sum(map(sum, recorder.counts)) == layers * k * len(tokens)
    assert recorder.counts == chosen(router_logits, k)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_each_sequence_of_a_compiled_step_counts_as_in_torch(precision, batch_size, monkeypatch):
    """Layer by layer: both ways choose the same experts, and the compiled one reports them once a layer."""
    engine, recorder = counting_engine(precision)
    steps, counts = 4, []
    for way in ("compiled", "torch"):
        if way == "torch":
            monkeypatch.setattr(engine.runner, "_decoder", None)
        sequences = [engine.runner.sequence() for _ in range(batch_size)]
        for step in range(steps):
            engine.runner.step([(sequence, [30 * n + step + 5]) for n, sequence in enumerate(sequences)])
        counts.append(torch.tensor(recorder.counts))
    assert torch.equal(counts[1], 2 * counts[0])
    assert counts[0].sum(1).unique().tolist() == [steps * batch_size * engine.config.expert_used_count]


def test_counts_of_a_generation_are_those_of_its_computed_tokens(ids, router_logits):
    """Of the prompt the last layer computes its last token only. The last sampled token is not computed."""
    prompt, tokens = ids
    engine, recorder = counting_engine("exact")
    completion = engine.generate(tokens[:prompt], fiddler.Sampling(temperature=0.0), DECODED, ignore_eos=True)
    assert [*tokens[:prompt], *completion.tokens[:-1]] == tokens
    computed = [*router_logits[:-1], router_logits[-1][prompt - 1 :]]
    assert recorder.counts == chosen(computed, engine.config.expert_used_count)


class Stops(SilentRecorder):
    """Breaks a step off at its second layer, while `active`."""

    wants_expert_ids, active = True, False

    def chosen(self, layer, expert_ids):
        if self.active and layer == 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize("tokens", [[7], [7, 8, 9]])
def test_a_step_that_a_recorder_breaks_off_can_be_repeated(tokens):
    """The compiled step of one token, and the step in torch of several."""
    recorder, undisturbed = Stops(), fiddler.load().runner
    runner, other = fiddler.load(recorder=recorder).runner, undisturbed.sequence()
    sequence = runner.sequence()
    assert torch.equal(runner.step([(sequence, [5])]).logits, undisturbed.step([(other, [5])]).logits)
    recorder.active = True
    with pytest.raises(KeyboardInterrupt):
        runner.step([(sequence, tokens)])
    assert sequence.length == 1
    recorder.active = False
    assert torch.equal(runner.step([(sequence, tokens)]).logits, undisturbed.step([(other, tokens)]).logits)


def test_the_compiled_step_reports_no_experts_where_nobody_listens():
    recorder = Stops()
    recorder.active, recorder.wants_expert_ids = True, False
    runner = fiddler.load(recorder=recorder).runner
    sequence = runner.sequence()
    runner.step([(sequence, [5])])
    assert sequence.length == 1
