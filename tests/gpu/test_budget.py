"""What needs a GPU: that its memory is kept to what was asked for, and what a budget that does not suffice says."""

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


def test_the_budget_holds():
    """What the driver counts as used never passes what was asked for, prompts and generation included.

    In a process of its own, which has nothing on the GPU before.
    """
    code = (
        "import fiddler\n"
        "e = fiddler.load(device='cuda', gpu_memory='1400MiB')\n"
        "g = e.start([5] * (e.context - 40), fiddler.Sampling(temperature=0.0), 30, ignore_eos=True)\n"
        "[None for _ in g]\n"
        "e.logits([5] * e.context)\n"
        "print(e.runner.budget.used(), e.runner.budget.total)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    used, total = map(int, done.stdout.split())
    assert 0 < used <= total == 1400 << 20


def test_a_budget_too_small_for_the_dense_part_says_what_suffices(tmp_path):
    """In processes of their own: what others have left of the driver's memory counts."""
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
    "asked,says", [("900GiB", "give at most"), ("100MiB", "give more"), ("8 apples", "give a size")]
)
def test_a_budget_that_makes_no_sense(asked, says):
    with pytest.raises(fiddler.FiddlerError, match=says):
        load(device="cuda", gpu_memory=asked)
