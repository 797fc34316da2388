"""Kernels cached on disk: shared by processes, and compiled anew where a file is damaged."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CACHE = """
import sys, numpy as np
from fiddler import kernels
variant = kernels.KernelVariant(kernels.choose_tier("portable"), "bf16", "f32")
kernels.precompile(variant)
from fiddler.kernels.matmul.grouped import grouped_products
y = kernels.linear(np.ones((1, 2), np.float32), np.full((1, 2), 0x3F80, np.uint16), variant)
print(y[0, 0], sum(grouped_products.stats.cache_hits.values()))
"""

HALVES = """
import sys
from fiddler import kernels
from fiddler.kernels import attention, decode_step, norm_router
from fiddler.kernels.matmul import grouped, blocks as matmul
if sys.argv[1:]:
    sys.executable = sys.argv[1]
sys.modules["fiddler.kernels.precompile"].usable_cores = lambda: 2
notices = []
variant = kernels.KernelVariant(kernels.choose_tier("portable"), "bf16", "f32")
kernels.precompile(variant, lambda: notices.append(1), decode=True)
one = grouped.grouped_products, attention._attend, norm_router._rms_norm
other = matmul._block_product, grouped._take_tasks, decode_step.decode
print(len(notices), *(sum(sum(kernel.stats.cache_hits.values()) for kernel in half) for half in (one, other)))
"""


def run_with_cache(folder, code=CACHE, *arguments):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_second_process_compiles_half_of_the_kernels(tmp_path):
    assert run_with_cache(tmp_path, HALVES) == ["1", "0", "3"]
    assert run_with_cache(tmp_path, HALVES) == ["0", "3", "3"]


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false", ""])
def test_kernels_are_compiled_here_where_the_second_process_fails(tmp_path, python):
    assert run_with_cache(tmp_path, HALVES, python) == ["1", "0", "0"]
    assert run_with_cache(tmp_path, HALVES, python) == ["0", "3", "3"]


def test_a_damaged_kernel_cache_is_compiled_anew(tmp_path):
    assert run_with_cache(tmp_path) == ["2.0", "0"]
    assert run_with_cache(tmp_path) == ["2.0", "1"]
    for pattern, fraction in (("*.nbi", 0.5), ("*.nbc", 0.5), ("*.nbi", 0.0)):
        damaged = list(tmp_path.rglob(pattern))
        assert damaged
        for path in damaged:
            path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
        assert run_with_cache(tmp_path) == ["2.0", "0"], (pattern, fraction)
    assert run_with_cache(tmp_path) == ["2.0", "1"]
