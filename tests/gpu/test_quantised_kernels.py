"""Triton kernels for quantised weights in Triton's interpreter, and compiled for an H100: needs Triton, but no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fiddler.kernels.formats import GPU_FORMATS
from gpu.test_grouped_kernels import PROBE, interpreted

PROGRAM = """
import torch
from fiddler.kernels.formats import GPU_FORMATS
from oracles import block_kernel_checks as checks

for kind in sorted(GPU_FORMATS):
    checks.check_decoder(kind, "cpu", rows=3, columns=512)
    checks.check_gemv(kind, "cpu")
for kinds in MIXTURES:
    checks.check_experts_of_one(kinds, "cpu")
    for tokens in (3, 20):
        checks.check_experts_of_many(kinds, "cpu", torch.float16, tokens)  # the interpreter's bf16 products are wrong
print("right")
"""
MIXTURES = [("q8_0",) * 3, ("q4_k", "q4_k", "q6_k"), ("q5_k", "mxfp4", "iq4_nl"), ("q4_0", "iq4_xs", "q5_1")]


def test_quantised_weights_are_decoded_and_multiplied_as_float64_does(tmp_path):
    if interpreted(PROBE, tmp_path).returncode:
        pytest.skip("Triton's interpreter fails with this version of numpy")
    finished = interpreted(PROGRAM.replace("MIXTURES", repr(MIXTURES)), tmp_path)
    assert finished.stdout == "right\n", finished.stderr[-2000:]
