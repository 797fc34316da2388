"""Kernels cached on disk: shared by processes; a damaged one alone is compiled anew; none is needed."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from fiddler.kernels.codegen import kernel_cache
from fiddler.kernels.precompile import COMPILING
from oracles.command import wait_until

START = """
import resource, sys
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
if sys.argv[4] != "None":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
sys.modules["fiddler.kernels.precompile"].usable_cores = lambda: cores
notices = []
variant = kernels.KernelVariant(kernels.choose_tier("portable"), "bf16", "f32")
with event.install_listener("numba:compile", Compilations()) as compilations:
    precompile(variant, notices.append, decode=decode)
    y = kernels.linear(np.ones((1, 2), np.float32), np.full((1, 2), 0x3F80, np.uint16), variant)
print(y[0, 0], compilations.count, *notices, sep="\\n")
"""


class Start(NamedTuple):
    """What a process that precompiled and multiplied reports: result, compilations of its own, and notices."""

    y: float
    compilations: int
    notices: tuple[str, ...] = ()


NOTHING_TO_DO = Start(2.0, 0)


def start(cache, python=sys.executable, cores=1, decode=False, largest_file=None):
    """Start a process with its kernels' cache in a folder, and `python` for a helper where there are 2 cores."""
    command = [sys.executable, "-c", START, python, str(cores), str(decode), str(largest_file)]
    done = subprocess.run(command, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    y, compilations, *notices = done.stdout.splitlines()
    return Start(float(y), int(compilations), tuple(notices))


def compiled_here_or_by_a_helper(done):
    assert (done.y, done.notices) == (2.0, (COMPILING,))
    assert done.compilations > 0


def files(cache):
    return {path.relative_to(cache): path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}


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
    compiled_here_or_by_a_helper(first)
    before = files(cache)
    assert before
    assert start(cache, decode=True) == NOTHING_TO_DO
    assert files(cache) == before


def test_a_helper_process_compiles_half_of_the_kernels(compiled_here, tmp_path):
    alone, first = compiled_here
    helped = start(tmp_path, cores=2, decode=True)
    compiled_here_or_by_a_helper(helped)
    assert 0 < helped.compilations < first.compilations
    assert {path.name for path in files(tmp_path)} == {path.name for path in files(alone)}
    assert start(tmp_path, cores=2, decode=True) == NOTHING_TO_DO


@pytest.mark.parametrize("python", ["/nowhere/python", "/bin/false", ""])
def test_kernels_are_compiled_here_where_the_helper_process_fails(compiled, python):
    """Of either half a kernel is missing."""
    complete = {path.name for path in files(compiled)}
    removed = [path for name in ("norm_router.", "packing.") for path in compiled.rglob(f"{name}*")]
    assert removed
    for path in removed:
        path.unlink()
    compiled_here_or_by_a_helper(start(compiled, python, cores=2))
    assert {path.name for path in files(compiled)} == complete
    assert start(compiled, python, cores=2) == NOTHING_TO_DO


def entry(cache, kernel="norm_router._rms_norm"):
    """The only file of a kernel, one that is compiled quickly."""
    (path,) = cache.rglob(f"{kernel}-*")
    return path


def flipped(data, place):
    place = int(place * (len(data) - 1))
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "a bit of the checksum": lambda data: flipped(data, 0),
    "a bit of the code": lambda data: flipped(data, 0.7),
    "the last bit": lambda data: flipped(data, 1),
    "no machine code": lambda data: pickle.dumps("nothing"),
    "longer": lambda data: data + b"x",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_alone_is_compiled_anew(compiled, damage):
    path, before = entry(compiled), files(compiled)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    damaged = files(compiled)
    compiled_here_or_by_a_helper(start(compiled))
    after = files(compiled)
    assert before.keys() == after.keys()
    assert {name for name in after if after[name] != damaged[name]} == {path.relative_to(compiled)}
    assert start(compiled) == NOTHING_TO_DO


def test_machine_code_under_another_kernel_s_name_is_not_run(compiled):
    path = entry(compiled)
    shutil.copy(entry(compiled, "norm_router._route"), path)
    compiled_here_or_by_a_helper(start(compiled))
    assert start(compiled) == NOTHING_TO_DO


def test_entries_of_an_earlier_source_and_of_numba_itself_are_removed_with_the_next_that_is_written(compiled):
    path, complete = entry(compiled), files(compiled).keys()
    base = path.name.split(".py3")[0]
    python = path.name.removeprefix(base + ".").partition(".")[0]
    for name in (f"{base}.{python}.nbi", f"{base}.{python}.1.nbc", f"{base}0.{python}.0123-4567.nbc"):
        path.with_name(name).write_bytes(b"")
    others = path.with_name(f"{base}.py399.0123-4567.nbc")  # of another Python
    others.write_bytes(b"")
    path.unlink()
    compiled_here_or_by_a_helper(start(compiled))
    assert files(compiled).keys() == complete | {others.relative_to(compiled)}


def test_a_full_disk_under_the_cache_is_one_warning(compiled):
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    for kernel in ("norm_router._rms_norm", "norm_router._route"):
        entry(compiled, kernel).unlink()
    before = files(compiled)
    done = start(compiled, largest_file=4096)
    assert done.y == 2.0
    assert done.compilations > 0
    compiling, warning = done.notices
    assert compiling == COMPILING
    assert re.fullmatch(r"warning: kernels cannot be cached in '.*': File too large; .*NUMBA_CACHE_DIR.*", warning)
    assert files(compiled) == before


def test_kernels_run_without_a_cache_where_its_files_can_be_neither_read_nor_removed(compiled):
    """A folder in a file's place resists both, from root too, as others' files in a read-only folder do."""
    path = entry(compiled)
    path.unlink()
    path.mkdir()
    before = sorted(compiled.rglob("*"))
    done = start(compiled)
    assert done.y == 2.0
    assert done.compilations > 0
    assert [notice.partition(":")[0] for notice in done.notices] == [COMPILING, "warning"]
    assert sorted(compiled.rglob("*")) == before


def test_files_are_whole_where_the_file_system_has_no_unnamed_ones(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    kernel_cache._write(tmp_path / "kernel", b"code")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kernel": b"code"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_helper_process_ends_with_its_parent(tmp_path, number):
    """Before it has imported what it needs: then it looks for its parent, and after that the kernel does."""
    python, told = tmp_path / "python", tmp_path / "pid"
    python.write_text(f'#!/bin/sh\necho $$ > {told}.part\nmv {told}.part {told}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = [sys.executable, "-c", START, str(python), "2", "True", "None"]
    parent = subprocess.Popen(
        command,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: None if number == signal.SIGKILL else signal.signal(number, signal.SIG_DFL),  # under nohup
    )
    wait_until(parent, told.exists)
    helper = Path("/proc") / told.read_text().strip()
    assert helper.exists()
    parent.send_signal(number)
    assert parent.wait(10) == -number
    deadline = time.monotonic() + 10
    while helper.exists() and "Z" not in (helper / "stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
