"""What needs a GPU: logits made there against transformers' own, of random Mixtrals and of the demo model."""

from __future__ import annotations

import pytest
import torch

import fiddler
from fiddler.loading import DEMO_MODEL, load

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("transformers")

from oracles.reference import Reference, Shape, from_gguf, make_checkpoint

WAYS = {
    "hybrid": {"gpu_experts": 5},
    "streamed": {"gpu_experts": 5, "missing": "stream"},
    "no residents": {"gpu_experts": 0},
    "GPU": {},
}


def held(path, expected, ids, precision, bound):
    """Asserts of every way that a prompt's logits are those, and so are the same token by token."""
    for name, options in WAYS.items():
        engine = load(path, device="cuda", precision=precision, **options)
        assert (engine.logits(ids) - expected).norm() <= bound * expected.norm(), name
        sequence = engine.runner.sequence()
        engine.runner.prefill(sequence, ids[:10])
        one = torch.cat([engine.runner.logits(engine.runner.step([(sequence, [token])])) for token in ids[10:]])
        assert (one - expected[10:]).norm() <= bound * expected[10:].norm(), name


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
def test_logits_are_those_of_transformers(shape, tmp_path):
    folder = make_checkpoint(shape, tmp_path / "hf")
    fiddler.convert(folder, tmp_path / "model.gguf")
    ids = torch.randint(3, 512, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    held(tmp_path / "model.gguf", Reference(folder)(ids)[0], ids, "exact", 1e-4)


@pytest.mark.parametrize("precision,bound", [("exact", 1e-4), ("fast", 3e-2)])
def test_the_demo_models_logits_are_those_of_transformers(precision, bound):
    ids = load(device="cpu").tokenizer.encode("Once upon a time, in a small village, there lived", add_bos=True)
    with torch.inference_mode():
        expected = from_gguf(DEMO_MODEL)(torch.tensor([ids])).logits[0]
    held(DEMO_MODEL, expected, ids, precision, bound)
