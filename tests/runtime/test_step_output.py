"""A step's logits are those of its hidden states, by the compiled decode step and by the model in torch."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.evaluation.perplexity import measure
from fiddler.telemetry.expert_counts import ExpertCounts
from oracles.synthetic import write_random_mixtral

ONE, SEVERAL = [[7]], [[7], [9], [11]]
PROMPTS = [[1, 40, 50, 60], [1, 80], [90]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("step") / "tiny.gguf")


@pytest.fixture(params=["fast", "exact"])
def engine(path, request):
    return fiddler.load(path, device="cpu", precision=request.param)


def step(runner, parts, wanted=None, **options):
    return runner.step([(runner.sequence(), tokens) for tokens in parts], wanted, **options)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "parts, wanted",
    [
        *((ONE, rows) for rows in (None, [0], ())),
        *((SEVERAL, rows) for rows in (None, [0, 2], [])),
        *((PROMPTS, rows) for rows in (None, [3, 6], ())),
    ],
)
def test_a_steps_logits_are_those_of_its_hidden_states(engine, monkeypatch, parts, wanted, compiled):
    if not compiled:
        monkeypatch.setattr(engine.runner, "_decoder", None)
    hidden, logits, _ = step(engine.runner, parts, wanted)
    rows = sum(map(len, parts)) if wanted is None else len(wanted)
    assert hidden.shape == (rows, engine.config.embedding_length)
    assert logits.shape == (rows, engine.config.vocab_size)
    assert torch.equal(logits, engine.runner.logits(hidden))
    assert step(engine.runner, parts, wanted, logits=False).logits is None
    whole = step(engine.runner, parts).logits
    expected = whole if wanted is None else whole[list(wanted)]
    assert torch.allclose(logits, expected, atol=1e-4 if engine.runner.cache_dtype == torch.float32 else 3e-2)


def test_a_step_without_wanted_rows_skips_the_last_layers_experts(path, engine):
    recorder = ExpertCounts(engine.config.block_count, engine.config.expert_count)
    counted = fiddler.load(path, device="cpu", recorder=recorder)
    step(counted.runner, PROMPTS, ())
    *others, last = (sum(counts) for counts in recorder.counts)
    assert (set(others), last) == ({7 * engine.config.expert_used_count}, 0)


def test_a_step_whose_logits_fail_leaves_the_sequences_as_they_were(engine, monkeypatch):
    sequence = engine.runner.sequence()
    engine.runner.step([(sequence, [5, 6])])
    monkeypatch.setattr(engine.runner.model, "logits", fail)
    with pytest.raises(MemoryError):
        engine.runner.step([(sequence, [7, 8])])
    assert sequence.length == 2


def fail(hidden):
    raise MemoryError


def test_perplexity_computes_a_windows_logits_piece_by_piece(engine, monkeypatch):
    rows, real = [], engine.runner.logits
    monkeypatch.setattr(engine.runner, "logits", lambda hidden: rows.append(len(hidden)) or real(hidden))
    list(measure(engine.runner, [[1, *range(20, 51)]] * 2, None))
    assert rows == [15, 15]  # the scored positions, and no others
