"""Every family's logits against transformers' on random checkpoints, converted by `fiddler convert`.

Exact precision computes the same function. Fast precision is compared for Mixtral in `test_reference.py`.
"""

from __future__ import annotations

import pytest
import torch

import fiddler
from oracles.deepseek_moe import DeepSeekReference, DeepSeekShape, make_deepseek_checkpoint
from oracles.families import CASES, FamilyReference, make_family_checkpoint

EXACT = 1e-4  # relative L2 error of a sequence's logits


DEEPSEEK = {
    "deepseek": DeepSeekShape(),
    "deepseek, odd, GQA": DeepSeekShape(D=66, heads=3, kv_heads=1, dense_layers=2, shared=1, theta=5e3),
    "deepseek, f16, renormalised": DeepSeekShape(D=72, dtype=torch.float16, renormalise=True, experts=6),
}


@pytest.fixture(scope="module", params=[*CASES, *DEEPSEEK], ids=[*CASES, *DEEPSEEK])
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "checkpoint"
    if request.param in DEEPSEEK:
        make_deepseek_checkpoint(DEEPSEEK[request.param], folder)
        reference = DeepSeekReference(folder)
    else:
        make_family_checkpoint(CASES[request.param], folder)
        reference = FamilyReference(folder)
    fiddler.convert(folder, folder.with_suffix(".gguf"))
    return reference, folder.with_suffix(".gguf")


def test_exact_logits_and_the_most_probable_tokens_are_those_of_transformers(converted):
    reference, path = converted
    engine = fiddler.load(path, precision="exact", device="cpu")
    generator = torch.Generator().manual_seed(3)
    for length in (1, 5, 40, 100):
        ids = torch.randint(0, 512, (length,), generator=generator).tolist()
        expected, logits = reference(ids), engine.logits(ids)
        assert torch.linalg.norm(logits - expected) < EXACT * torch.linalg.norm(expected)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_tokens_one_by_one_give_the_same_logits_as_the_whole_sequence(converted):
    _, path = converted
    engine = fiddler.load(path, precision="exact", device="cpu")
    ids = torch.randint(0, 512, (20,), generator=torch.Generator().manual_seed(4)).tolist()
    whole, sequence = engine.logits(ids), engine.runner.sequence()
    compiled = engine.config.latent is None and engine.config.rotated_scale == 1.0
    assert (engine.runner._decoder is not None) == compiled
    for token, expected in zip(ids, whole, strict=True):
        logits = engine.runner.step([(sequence, [token])]).logits
        assert torch.linalg.norm(logits[0] - expected) < EXACT * torch.linalg.norm(expected)
