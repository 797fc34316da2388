"""Models whose experts have one 16-bit type and whose dense matrices another, as other converters write them."""

from __future__ import annotations

import pytest
import torch

import fiddler
from oracles.reference import from_gguf
from oracles.synthetic import write_random_mixtral

IDS = [1, *range(3, 500, 11)]


@pytest.mark.parametrize("experts", ["bf16", "f16"])
@pytest.mark.parametrize("dense", ["bf16", "f16", "f32"])
def test_logits_of_a_model_of_mixed_types_match_transformers(tmp_path, experts, dense):
    path = write_random_mixtral(tmp_path / "mixed.gguf", dtype=experts, dense_dtype=dense, seed=4)
    logits = fiddler.load(path, precision="exact").logits(IDS)
    with torch.inference_mode():
        expected = from_gguf(path)(torch.tensor([IDS]), use_cache=False).logits[0]
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.max() < 1e-4
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
