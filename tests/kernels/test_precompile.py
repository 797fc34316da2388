"""Kernels cached on disk: shared by processes, and compiled anew where a file is damaged."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

START = """
import sys
import numpy as np
from numba.core import event
from fiddler import kernels
from fiddler.kernels.precompile import precompile

class Compilations(event.Listener):
    count = 0
    def on_start(self, event):
        self.count += 1
    def on_end(self, event):
        pass

sys.executable, cores, decode = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
sys.modules["fiddler.kernels.precompile"].usable_cores = lambda: cores
notices = []
variant = kernels.KernelVariant(kernels.choose_tier("portable"), "bf16", "f32")
with event.install_listener("numba:compile", Compilations()) as compilations:
    precompile(variant, notices.append, decode=decode)
    y = kernels.linear(np.ones((1, 2), np.float32), np.full((1, 2), 0x3F80, np.uint16), variant)
print(y[0, 0], len(notices), compilations.count)
"""


class Start(NamedTuple):
    """What a process that precompiled and multiplied reports: result, notices, and compilations of its own."""

    y: float
    notices: int
    compilations: int


def start(cache, python=sys.executable, cores=1, decode=False):
    """Start a process with its kernels' cache in a folder, and `python` for a helper where there are 2 cores."""
    command = [sys.executable, "-c", START, python, str(cores), str(decode)]
    done = subprocess.run(command, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    y, notices, compilations = done.stdout.split()
    return Start(float(y), int(notices), int(compilations))


def files(cache):
    return {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.rglob("*.nb[ic]")}


@pytest.fixture(scope="module")
def compiled_here(tmp_path_factory):
    """A cache of a process without a helper, and what this process reported."""
    cache = tmp_path_factory.mktemp("cache")
    return cache, start(cache, decode=True)


@pytest.fixture
def compiled(compiled_here, tmp_path):
    """A copy of that cache, to damage."""
    return Path(shutil.copytree(compiled_here[0], tmp_path / "copy"))


def test_a_second_start_compiles_nothing_and_writes_nothing(compiled_here):
    cache, first = compiled_here
    assert (first.y, first.notices) == (2.0, 1)
    assert first.compilations > 0
    before = files(cache)
    assert before
    assert start(cache, decode=True) == Start(2.0, 0, 0)
    assert files(cache) == before


def test_a_helper_process_compiles_half_of_the_kernels(compiled_here, tmp_path):
    alone, first = compiled_here
    helped = start(tmp_path, cores=2, decode=True)
    assert (helped.y, helped.notices) == (2.0, 1)
    assert 0 < helped.compilations < first.compilations
    assert {path.name for path in files(tmp_path)} == {path.name for path in files(alone)}
    assert start(tmp_path, cores=2, decode=True) == Start(2.0, 0, 0)


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false", ""])
def test_kernels_are_compiled_here_where_the_helper_process_fails(compiled, python):
    """Of either half a kernel is missing."""
    complete = {path.name for path in files(compiled)}
    removed = [path for name in ("norm_router.", "packing.") for path in compiled.rglob(f"{name}*")]
    assert removed
    for path in removed:
        path.unlink()
    done = start(compiled, python, cores=2)
    assert (done.y, done.notices) == (2.0, 1)
    assert done.compilations > 0
    assert {path.name for path in files(compiled)} == complete
    assert start(compiled, python, cores=2) == Start(2.0, 0, 0)


@pytest.mark.parametrize(("pattern", "fraction"), [("*.nbi", 0.5), ("*.nbc", 0.5), ("*.nbi", 0.0)])
def test_a_damaged_kernel_cache_is_compiled_anew(compiled, pattern, fraction):
    for path in compiled.rglob(pattern):
        path.write_bytes(path.read_bytes()[: int(fraction * path.stat().st_size)])
    done = start(compiled)
    assert (done.y, done.notices) == (2.0, 1)
    assert done.compilations > 0
    assert start(compiled) == Start(2.0, 0, 0)


def test_kernels_run_without_a_cache_where_its_files_can_be_neither_read_nor_removed(compiled_here, tmp_path):
    """A folder in a file's place resists both, from root too, as others' files in a read-only folder do."""
    for path in files(compiled_here[0]):
        (tmp_path / path).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = start(tmp_path)
    assert (done.y, done.notices) == (2.0, 1)
    assert done.compilations > 0
    assert sorted(tmp_path.rglob("*")) == before
