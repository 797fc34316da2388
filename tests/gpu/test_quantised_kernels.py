"""Triton kernels for quantised weights in Triton's interpreter, and compiled for an H100: needs Triton, but no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from gpu.test_grouped_kernels import PROBE, interpreted

PROGRAM = """
import torch
from fiddler.kernels.formats import GPU_FORMATS
from fiddler.offload import grouped_kernels
from oracles import block_kernel_checks as checks

for kind in sorted(GPU_FORMATS):
    checks.check_decoder(kind, "cpu", rows=3, columns=512)
    checks.check_gemv(kind, "cpu")
for kinds in MIXTURES:
    checks.check_experts_of_one(kinds, "cpu", (2, 512, 256))
    checks.check_experts_of_many(kinds, "cpu", torch.float16, 3, (2, 512, 256))  # the interpreter's bf16 is wrong
grouped_kernels._TILED = 1  # most experts are decoded beforehand
checks.check_experts_of_many(("q8_0", "q4_1", "q5_0"), "cpu", torch.float16, 4, (2, 128, 64), 64)
print("right")
"""
MIXTURES = [("q4_k", "q8_0", "q6_k"), ("mxfp4", "q5_k", "iq4_nl")]


def test_quantised_weights_are_decoded_and_multiplied_as_float64_does(tmp_path):
    if interpreted(PROBE, tmp_path).returncode:
        pytest.skip("Triton's interpreter fails with this version of numpy")
    finished = interpreted(PROGRAM.replace("MIXTURES", repr(MIXTURES)), tmp_path)
    assert finished.stdout == "right\n", finished.stderr[-2000:]
