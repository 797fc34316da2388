"""The process that compiles a kernel runs the code that later ones read, and none runs code of other sources."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fiddler import kernels
from fiddler.kernels import norm_router
from fiddler.kernels.codegen import kernel_cache

PRODUCT = """
import sys
import numpy as np
from fiddler import kernels
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul.blocks import _block_product

name, tier, K, N, tokens = sys.argv[1], sys.argv[2], 256, 48, 5
rng = np.random.default_rng(0)
w = BLOCK_FORMATS[name].encode(rng.standard_normal((N, K)).astype(np.float32))
x, c = np.empty((tokens, 3 * K // 2), np.uint8), np.empty((N, tokens), np.float32)
x[:, :K] = rng.integers(0, 256, (tokens, K))
x[:, K:].view(np.float32)[:] = rng.random((tokens, K // 8))  # scales and sums: see `int8_activations`
variant = kernels.KernelVariant(kernels.choose_tier(tier), name, "q8")
_block_product(variant, False, address_of(w), K, N, address_of(x), 3 * K // 2, tokens, K, address_of(c), tokens, 0, 0)
assert np.isfinite(c).all()
print(sum(_block_product.stats.cache_hits.values()), c.tobytes().hex())
"""

PARALLEL = """
import numpy as np
from fiddler.kernels.bandwidth import _sum

assert _sum(np.ones(5, np.uint64)) == 5
(result,) = _sum.overloads.values()
print(*sorted({function.linkage.name for function in result.library.get_defined_functions()}))
"""


def words_of(cache, script, *arguments):
    """What a script prints in a process of its own, with its kernels' cache in a folder."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def product(cache, name, tier):
    """How often a process found its kernel on disk, and the bits of a product."""
    hits, bits = words_of(cache, PRODUCT, name, tier)
    return int(hits), bits


@pytest.mark.parametrize("tier", sorted({kernels.available_tiers()[0].name, "portable"}))
def test_a_product_has_the_same_bits_where_its_kernel_is_compiled_and_where_it_is_read_from_disk(tier, tmp_path):
    """Of MXFP4, a function that the kernel calls adds in another order where it is optimised by itself."""
    compiled, read = product(tmp_path, "mxfp4", tier), product(tmp_path, "mxfp4", tier)
    assert (compiled[0], read[0]) == (0, 1)
    assert compiled[1] == read[1]


def test_a_parallel_kernel_shares_neither_its_loop_nor_any_function_with_others(tmp_path):
    """Of two weak functions of one name, the first that is loaded would run."""
    assert words_of(tmp_path, PARALLEL) == ["external", "internal"]


def test_two_releases_of_numba_keep_the_entries_of_each_other(monkeypatch):
    """Their own stamps of a file differ, and entries with another stamp are removed as those of earlier sources."""
    cache = norm_router._rms_norm._cache
    before = cache._stamp()
    monkeypatch.setattr(type(cache._impl.locator), "get_source_stamp", lambda locator: "another release's")
    assert cache._stamp() == before


def test_a_kernel_is_not_read_from_disk_once_any_of_the_kernels_sources_has_changed(monkeypatch, tmp_path):
    """Numba compares only the file of the function itself, but a kernel calls functions of others."""
    cache = norm_router._rms_norm._cache
    before = cache._stamp()
    assert cache._stamp() == before
    monkeypatch.setattr(kernel_cache, "SOURCES", "others")
    assert cache._stamp() != before
    (tmp_path / "room").mkdir()
    digests = [kernel_cache._digest_of_sources(tmp_path)]
    for text in ("a = 1", "a = 2"):
        (tmp_path / "room" / "file.py").write_text(text)
        digests.append(kernel_cache._digest_of_sources(tmp_path))
    assert len(set(digests)) == 3
    monkeypatch.undo()
    assert kernel_cache._digest_of_sources(Path(kernels.__file__).parent) == kernel_cache.SOURCES
