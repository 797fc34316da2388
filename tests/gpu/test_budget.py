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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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

    refused = loaded("900MiB").stderr
    least = re.search(r"needs ([\d.]+GiB)", refused)
    assert least, refused
    assert loaded(least[1]).returncode == 0


@pytest.mark.parametrize(
    "budget,message", [("900GiB", "give at most"), ("100MiB", "give more"), ("8 apples", "give a size")]
)
def test_a_budget_that_is_too_large_too_small_or_no_size_is_refused(budget, message):
    with pytest.raises(fiddler.FiddlerError, match=message):
        load(device="cuda", gpu_memory=budget)


def test_nothing_limits_torch_once_an_engine_is_gone_or_was_refused(tmp_path):
    """In a new process; the allocations are larger than the budgets."""
    path = synthetic.write_random_mixtral(tmp_path / "model.gguf", d=256, f=512, heads=8, layers=2, context=1 << 20)
    code = (
        "import sys, torch, fiddler\n"
        "def fits(): return torch.empty(3 << 30, dtype=torch.uint8, device='cuda').numel()\n"
        "def load(**more): return fiddler.load(sys.argv[1], device='cuda', **more)\n"
        "try: load(gpu_memory='1GiB', context=1 << 20)\n"
        "except fiddler.FiddlerError: pass\n"
        "else: raise SystemExit('it was not refused')\n"
        "fits()\n"
        "first, second = load(gpu_memory='1400MiB', context=64), load(gpu_memory='1500MiB', context=64)\n"
        "for engine in (first, second):\n"
        "    try: fits()\n"
        "    except torch.OutOfMemoryError: engine.close()\n"
        "    else: raise SystemExit('nothing limits torch')\n"
        "del first, second, engine\n"
        "fits()\n"
        "print('right')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr[-2000:]
