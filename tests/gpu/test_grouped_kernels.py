"""A prompt's experts by the grouped kernels in Triton's interpreter: needs Triton, but no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import numpy as np
import torch
from fiddler.offload import grouped_kernels
from fiddler.offload.feed_forward import tokens_by_expert
from fiddler.offload.gpu_side import SortedInputs
from fiddler.cost_curve import Curve
from fiddler.offload.plan import Costs
from oracles.both_sides import D, E, F, LAYERS, orchestrator, weights_of

grouped_kernels._NUMBERS = 160  # job lists are written over each other after a few launches
layers = weights_of("f16", "f32")  # as if inputs were rounded: the interpreter's bf16 products are wrong
costs, device = Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), 1.0, 0.0), torch.device("cpu")
rng = np.random.default_rng(0)
for rows in (2 * F, 128):  # slots of two experts, and of a part of one
    sides = [
        orchestrator(layers, [[0, 2], [], [1]], costs, rows=rows, grouped=grouped)
        for grouped in (grouped_kernels.Grouped(device), None)
    ]
    for layer in range(LAYERS):
        for tokens in (1, 3, 30):
            expert_ids = np.array([rng.permutation(E)[:3] for _ in range(tokens)], np.int64)
            counts, first = tokens_by_expert(expert_ids, E)
            token = torch.from_numpy(np.argsort(expert_ids.reshape(-1), kind="stable") // 3)
            x, routing_weights = torch.from_numpy(rng.normal(size=(tokens, D))).half(), torch.rand(tokens * 3)
            outputs = []
            for side in sides:
                y = torch.zeros(tokens, D)
                inputs = SortedInputs(x, token, routing_weights, first, layers[layer], True, y)
                side._gpu_side._add_residents(inputs, layer, F)
                missing = [(e, 0, F) for e in np.flatnonzero(counts).tolist() if (layer, e) not in side.residents]
                for parts in side.ring.send(layer, missing):
                    side._gpu_side.add_parts(inputs, parts[::-1])
                    side.ring.done(parts)
                outputs.append(y)
            error = (outputs[0] - outputs[1]).norm() / outputs[1].norm()
            assert 0 < error < 2**-10, (rows, layer, tokens, error)  # torch rounds gate's and up's products, too
print("right")
"""


PROBE = """
import torch, triton
from triton import language as tl

@triton.jit
def add_up(values, count):
    for i in range(0, count):
        tl.store(values + i, i)

add_up[(1,)](torch.zeros(3), 3)
"""


def interpreted(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in Triton's interpreter; from a file, since Triton reads the source of its kernels."""
    path = folder / "program.py"
    path.write_text(program)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=False)


def test_grouped_kernels_of_residents_and_slots_match_torch_expert_by_expert(tmp_path):
    if interpreted(PROBE, tmp_path).returncode:
        pytest.skip("Triton's interpreter fails with this version of numpy")
    finished = interpreted(PROGRAM, tmp_path)
    assert finished.stdout == "right\n", finished.stderr[-2000:]
