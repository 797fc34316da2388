"""Logits computed on the GPU against transformers', for random Mixtrals and the demo model. Needs a GPU."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.loading import DEMO_MODEL, load

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("transformers")

from oracles.deepseek_moe import DeepSeekReference, DeepSeekShape, make_deepseek_checkpoint
from oracles.families import CASES, FamilyReference, make_family_checkpoint
from oracles.fast_logits import check_fast_logits
from oracles.flipped_experts import ChosenExperts
from oracles.reference import Reference, Shape, from_gguf, make_checkpoint

FAST, FAST_INT8 = 1.5e-2, 2.5e-2  # as in `tests/models/test_families.py`
WAYS = {
    "GPU and CPU": {"gpu_experts": 5},
    "streamed": {"gpu_experts": 5, "missing": "stream"},
    "no residents": {"gpu_experts": 0},
    "GPU": {},
}


def assert_logits_match(path, expected, ids, precision, bound):
    """Assert for every way that the logits of a prompt match, read at once and token by token."""
    for name, options in WAYS.items():
        engine = load(path, device="cuda", precision=precision, **options)
        assert engine.runner._decoder is not None, "single tokens are graphs"
        assert (engine.logits(ids) - expected).norm() <= bound * expected.norm(), name
        sequence = engine.runner.sequence()
        engine.runner.prefill(sequence, ids[:10])
        by_token = torch.cat([engine.runner.step([(sequence, [token])]).logits for token in ids[10:]])
        assert (by_token - expected[10:]).norm() <= bound * expected[10:].norm(), name


@pytest.mark.parametrize(
    "shape",
    [
        Shape(),
        Shape(D=50, H=5, G=5, head_dim=10, E=3, F=33),
        Shape(E=16, K=3, L=3),
        Shape(H=8, G=1, head_dim=24, D=40, tied=True),
        Shape(dtype="f16", window=16, L=3),
    ],
    ids=str,
)
def test_gpu_logits_of_random_mixtrals_match_transformers(shape, tmp_path):
    folder = make_checkpoint(shape, tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_logits_match(tmp_path / "model.gguf", Reference(folder)(ids)[0], ids, "exact", 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gpu_logits_of_every_family_match_transformers(name, tmp_path):
    folder = make_family_checkpoint(CASES[name], tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_logits_match(tmp_path / "model.gguf", FamilyReference(folder)(ids), ids, "exact", 1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_fast_gpu_logits_of_every_family_are_those_of_transformers_but_for_roundings(name, way, tmp_path):
    folder = make_family_checkpoint(CASES[name], tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    recorder = ChosenExperts()
    engine = load(tmp_path / "model.gguf", device="cuda", precision="fast", recorder=recorder, **WAYS[way])
    bound = FAST_INT8 if CASES[name].packed and way != "GPU" else FAST  # the CPU rounds activations to int8
    print(check_fast_logits(engine, recorder, FamilyReference(folder), bound))  # noqa: T201


def test_gpu_logits_of_deepseek_moe_match_its_forward_pass(tmp_path):
    folder = make_deepseek_checkpoint(DeepSeekShape(), tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_logits_match(tmp_path / "model.gguf", DeepSeekReference(folder)(ids), ids, "exact", 1e-4)


@pytest.mark.parametrize("precision,bound", [("exact", 1e-4), ("fast", 3e-2)])
def test_gpu_logits_of_the_demo_model_match_transformers(precision, bound):
    ids = load(device="cpu").tokenizer.encode("Once upon a time, in a small village, there lived", add_bos=True)
    with torch.inference_mode():
        expected = from_gguf(DEMO_MODEL)(torch.tensor([ids])).logits[0]
    assert_logits_match(DEMO_MODEL, expected, ids, precision, bound)
