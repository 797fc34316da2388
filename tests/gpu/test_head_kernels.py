"""Triton's heads of queries and keys against torch's; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from fiddler.models.rotary import heads
from oracles.interpreter import run_in_interpreter

try:
    from fiddler.gpu import decode_kernels
except ImportError:
    decode_kernels = None

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")

CASES = {  # heads of queries and of keys, their width, elements that rotate with one half of them away, norms
    "as Qwen3-MoE": (4, 2, 64, 64, "each"),
    "as OLMoE": (4, 4, 32, 32, "all"),
    "as OLMoE with fewer keys": (6, 3, 20, 20, "all"),
    "as GLM-4.5": (6, 2, 32, 16, "each"),
    "as Qwen2-MoE": (3, 1, 24, 24, "none"),
    "neighbours with norms": (3, 1, 24, 0, "each"),
    "as Mixtral": (3, 1, 24, 0, "none"),
}


@pytest.mark.skipif(GPU or INTERPRETED or decode_kernels is None, reason="the kernels run in this process")
def test_heads_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


@kernels_run
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_make_the_heads_that_torch_makes(case):
    q_heads, k_heads, head_dim, halves, normed = case
    generator = torch.Generator().manual_seed(head_dim)
    widths = [q_heads * head_dim, k_heads * head_dim]
    sizes = {"each": [head_dim] * 2, "all": widths, "none": []}[normed]
    norms = [torch.rand(size, generator=generator) + 0.5 for size in sizes]
    for tokens in (1, 5):
        joined = torch.randn(tokens, sum(widths) + 7, generator=generator) * 3  # rows of a product of q, k and v
        q, k = joined.split([*widths, 7], 1)[:2]
        expected = heads(q.contiguous(), k.contiguous(), norms, 1e-5, head_dim, halves)
        actual_q, actual_k = joined.to(DEVICE).split([*widths, 7], 1)[:2]
        actual = decode_kernels.heads(actual_q, actual_k, [each.to(DEVICE) for each in norms], 1e-5, head_dim, halves)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-6)
