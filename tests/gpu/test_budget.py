"""GPU memory stays within its budget, and a budget that is too small names one that suffices. Needs a GPU."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

import fiddler
from fiddler.loading import load
from oracles import synthetic

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


def test_gpu_memory_stays_within_the_budget_for_prompts_and_generation():
    """By the driver's count, in a new process that has nothing on the GPU before."""
    code = (
        "import fiddler\n"
        "e = fiddler.load(device='cuda', gpu_memory='1400MiB')\n"
        "g = e.start(fiddler.Request([5] * (e.context - 40), fiddler.Sampling(temperature=0.0), 30, ignore_eos=True))\n"
        "[None for _ in g]\n"
        "e.logits([5] * e.context)\n"
        "print(e.runner.budget.used(), e.runner.budget.total)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, total = map(int, done.stdout.split())
    assert 0 < used <= total == 1400 << 20


def test_a_budget_too_small_for_the_dense_part_names_one_that_suffices(tmp_path):
    """In new processes: GPU memory that other engines of this process hold would count."""
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", d=1024, f=512, heads=8, layers=4, context=131072)
    code = (
        "import sys, fiddler\n"
        "e = fiddler.load(sys.argv[1], device='cuda', gpu_memory=sys.argv[2], context=131072)\n"
        "assert e.logits([5, 6]).isfinite().all()\n"
    )

    def loaded(budget):
        return subprocess.run([sys.executable, "-c", code, str(path), budget], capture_output=True, text=True)

    least = re.search(r"needs ([\d.]+GiB)", loaded("900MiB").stderr)[1]
    assert loaded(least).returncode == 0


@pytest.mark.parametrize(
    "budget,message", [("900GiB", "give at most"), ("100MiB", "give more"), ("8 apples", "give a size")]
)
def test_a_budget_that_is_too_large_too_small_or_no_size_is_refused(budget, message):
    with pytest.raises(fiddler.FiddlerError, match=message):
        load(device="cuda", gpu_memory=budget)
