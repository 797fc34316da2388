"""Triton kernels for quantised weights in Triton's interpreter, and compiled for an H100: needs Triton, but no GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from gpu.test_grouped_kernels import PROBE, interpreted

PROGRAM = """
import torch
from fiddler.kernels.formats import GPU_FORMATS
from oracles import block_kernel_checks as checks

for kind in sorted(GPU_FORMATS):
    checks.check_decoder(kind, "cpu", rows=3, columns=512)
    checks.check_gemv(kind, "cpu")
for kinds in MIXTURES:
    checks.check_experts_of_one(kinds, "cpu", (2, 512, 256))
    checks.check_experts_of_many(kinds, "cpu", torch.float16, 3, (2, 512, 256))  # the interpreter's bf16 is wrong
# most experts are decoded beforehand, whole or half by half
for nbytes in (1 << 17, 30000):
    checks.check_experts_of_many(("q8_0", "q4_1", "q5_0"), "cpu", torch.float16, 4, (2, 128, 64), 64, nbytes)
print("right")
"""
INT8 = """
from fiddler.gpu import int8_gemv
from fiddler.kernels.formats.triton_decoders import DOTS
from oracles import int8_kernel_checks as checks

checks.check_rounding("cpu")
checks.check_hidden("cpu")
checks.check_linear("cpu")
for kind in sorted(DOTS):
    checks.check_gemv(kind, "cpu", 3, 256)
checks.check_gemv("q4_k", "cpu", 9, 768)
checks.check_gemv("q6_k", "cpu", 3, 2048)  # rows of whole times 16 bytes
checks.check_gemv("q8_0", "cpu", 5, 352)  # an odd number of groups
large = int8_gemv.Tile(32, 32, 2)  # fewer programs: the interpreter takes its time for each
int8_gemv.TILES.update(dict.fromkeys(DOTS, int8_gemv.Tiles(large, large)))
for kinds in MIXTURES:
    checks.check_experts(kinds, "cpu", (2, 512, 256))
print("right")
"""
INT8_MIXTURES = [("q4_k", "q4_k", "q6_k"), ("mxfp4", "q5_k", "q4_k")]
MIXTURES = [("q4_k", "q8_0", "q6_k"), ("mxfp4", "q5_k", "iq4_nl")]


@pytest.mark.parametrize(
    "program",
    [PROGRAM.replace("MIXTURES", repr(MIXTURES)), INT8.replace("MIXTURES", repr(INT8_MIXTURES))],
    ids=["float32", "int8"],
)
def test_kernels_decode_and_multiply_quantised_weights_as_float64_does(program, tmp_path):
    """In float32, and with activations rounded to int8."""
    if interpreted(PROBE, tmp_path).returncode:
        pytest.skip("Triton's interpreter fails with this version of numpy")
    finished = interpreted(program, tmp_path)
    assert finished.stdout == "right\n", finished.stderr[-2000:]
