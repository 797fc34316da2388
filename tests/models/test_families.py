"""Every family's logits against transformers' on random checkpoints, converted by `fiddler convert`.

Exact precision computes the same function. In fast precision positions after a flipped expert are left out, as in
`test_reference.py`, which compares Mixtrals.
"""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.files.model_file import ModelFile
from oracles.deepseek_moe import DeepSeekReference, DeepSeekShape, make_deepseek_checkpoint
from oracles.families import CASES, FamilyReference, make_family_checkpoint
from oracles.fast_logits import check_fast_logits
from oracles.flipped_experts import ChosenExperts, RouterStep, flips

EXACT, FAST = 1e-4, 1.5e-2  # relative L2 error of a sequence's logits
FAST_INT8 = 2.5e-2  # where quantised experts multiply activations rounded to int8; llama.cpp's own: 0.6e-2 to 2e-2


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
    config, kinds = engine.config, {tensor.type for tensor in ModelFile.open(path).file.tensors.values()}
    compiled = config.latent is None and (config.rotated_scale == 1.0 or config.rotated == config.head_dim)
    assert (engine.runner._decoder is not None) == (compiled and kinds != {"F32", "BF16", "MXFP4"})
    for token, expected in zip(ids, whole, strict=True):
        logits = engine.runner.step([(sequence, [token])]).logits
        assert torch.linalg.norm(logits[0] - expected) < EXACT * torch.linalg.norm(expected)


def test_fast_logits_are_those_of_transformers_but_for_roundings(converted, request, capsys):
    reference, path = converted
    recorder = ChosenExperts()
    engine = fiddler.load(path, precision="fast", device="cpu", recorder=recorder)
    kinds = {tensor.type for tensor in ModelFile.open(path).file.tensors.values()}
    found = check_fast_logits(engine, recorder, reference, FAST_INT8 if "MXFP4" in kinds else FAST)
    with capsys.disabled():
        print(f"  {request.node.callspec.id}: {found}")  # noqa: T201


def test_a_flip_counts_as_a_rounding_only_where_the_margin_is_as_small():
    logits = torch.tensor([[3.0, 2.0, 1.99, 0.0]]).repeat(4, 1)  # norm 4.1: roundings of 0.06
    step = RouterStep(logits, lambda changed: torch.topk(changed, 2).indices)
    same, rounded, clear = torch.tensor([[0, 1]]), torch.tensor([[2, 0]]), torch.tensor([[0, 3]])
    ids = torch.cat([same, rounded, same, same])
    assert flips([step], {0: [ids]}, FAST, 4).clean.tolist() == [True, False, True, True]  # in the last layer
    assert flips([step, step], {0: [ids], 1: [same.repeat(4, 1)]}, FAST, 4).clean.tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert flips([step], {0: [ids]}, FAST, 4).clear is None
    assert (
        flips([step], {0: [torch.cat([same, same, clear, same])]}, FAST, 4).clear
        == "other experts at position 2 in layer 0"
    )
