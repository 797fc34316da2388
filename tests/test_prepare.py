"""Kernels that were kept on disk: found again, and made anew where they are damaged."""

from __future__ import annotations

import os
import subprocess
import sys

CACHE = """
import sys, numpy as np
from fiddler import kernels
product = kernels.Product(kernels.choose_tier("portable"), "bf16", "f32")
kernels.prepare(product)
from fiddler.kernels.grouped import grouped_products
y = kernels.linear(np.ones((1, 2), np.float32), np.full((1, 2), 0x3F80, np.uint16), product)
print(y[0, 0], sum(grouped_products.stats.cache_hits.values()))
"""


def run_with_cache(folder):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    result = subprocess.run([sys.executable, "-c", CACHE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_damaged_cache_is_made_anew(tmp_path):
    assert run_with_cache(tmp_path) == ["2.0", "0"]
    assert run_with_cache(tmp_path) == ["2.0", "1"]
    for pattern, keep in (("*.nbi", 0.5), ("*.nbc", 0.5), ("*.nbi", 0.0)):
        damaged = list(tmp_path.rglob(pattern))
        assert damaged
        for path in damaged:
            path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        assert run_with_cache(tmp_path) == ["2.0", "0"], (pattern, keep)
    assert run_with_cache(tmp_path) == ["2.0", "1"]
