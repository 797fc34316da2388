"""gpt-oss with quantised dense weights in the compiled step, in batches, and from the prefix cache.

Its logits against transformers' are in `tests/models/test_families.py`.
"""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.files.model_file import ModelFile
from fiddler.generation.request import Request
from oracles.families import CASES, make_family_checkpoint

EXACT = 1e-4
GREEDY = fiddler.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Q8_0, and MXFP4 experts, as published GGUFs have them."""
    folder = make_family_checkpoint(CASES["gpt-oss, MXFP4, wider, 3 shards"], tmp_path_factory.mktemp("gpt-oss") / "hf")
    fiddler.convert(folder, folder.with_suffix(".gguf"), quantisation="MXFP4_MOE")
    return folder.with_suffix(".gguf")


@pytest.fixture(scope="module")
def engine(path):
    return fiddler.load(path, precision="exact", device="cpu")


def random_ids(count, seed):
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_tokens_one_by_one_go_through_the_compiled_step_past_the_window(path, engine):
    assert {tensor.type for tensor in ModelFile.open(path).file.tensors.values()} == {"F32", "Q8_0", "MXFP4"}
    assert engine.runner._decoder is not None
    ids, sequence = random_ids(70, 1), engine.runner.sequence()  # the window is 32
    whole = engine.logits(ids)
    for token, expected in zip(ids, whole, strict=True):
        logits = engine.runner.step([(sequence, [token])]).logits
        assert torch.linalg.norm(logits[0] - expected) < EXACT * torch.linalg.norm(expected)
    assert None not in sequence.blocks  # every second layer still attends to all


def test_a_gpu_may_run_it(path):
    assert ModelFile.open(path).gpu_obstacle is None


def test_sequences_of_a_batch_get_the_logits_that_they_get_alone(engine):
    runner = engine.runner
    prompts = [random_ids(count, count) for count in (3, 40, 65)]
    sequences = [runner.sequence() for _ in prompts]
    runner.step(list(zip(sequences, prompts, strict=True)), wanted=[])
    outputs = runner.step([(sequence, [7]) for sequence in sequences]).logits
    mixed = runner.step([(sequences[0], [5]), (sequences[1], [9, 11]), (sequences[2], [4])]).logits
    for n, (prompt, after) in enumerate(zip(prompts, ([5], [9, 11], [4]), strict=True)):
        whole = engine.logits([*prompt, 7, *after])
        for actual, expected in ((outputs[n], whole[len(prompt)]), (mixed[[0, 2, 3][n]], whole[-1])):
            assert torch.linalg.norm(actual - expected) < EXACT * torch.linalg.norm(expected)


def test_a_prompt_that_begins_as_an_earlier_one_continues_as_without_the_cache(path):
    """Past the window, where a cache that forgot positions would lack those of every second layer."""
    engine, prompt = fiddler.load(path, precision="exact", device="cpu"), random_ids(96, 4)
    fresh = engine.generate(Request(prompt, GREEDY, 24, reuse=False).prompt, GREEDY, 24).tokens
    longer = [*prompt, *fresh[:10], 9, 8, 7]
    assert engine.runner.matched(longer) >= 64
    again = engine.generate(longer, GREEDY, 24).tokens
    other = fiddler.load(path, precision="exact", device="cpu")
    assert again == other.generate(longer, GREEDY, 24).tokens
