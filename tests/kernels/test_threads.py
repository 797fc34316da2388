"""The kernels' number of threads: its default, its limits, equal results for any number, two callers at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numba
import pytest

from fiddler import kernels
from fiddler.errors import RequestError
from fiddler.kernels.machine import threads

THREADS = """
import numpy as np
from fiddler import kernels
from fiddler.kernels.machine import threads
from fiddler.kernels.matmul import products_call
threads._PARALLEL_FROM = 0
variant = kernels.KernelVariant(kernels.choose_tier(), "bf16", "bf16")
rng = np.random.default_rng(0)
w = rng.integers(0x3C00, 0x3E00, (4, 300, 130)).astype(np.uint16)
down = rng.integers(0x3C00, 0x3E00, (4, 130, 300)).astype(np.uint16)
for tokens, rows in ((1, None), (1, [300, 0, 64, 130]), (9, None), (9, [64, 300, 2, 0]), (100, None)):  # 100: packed
    x = rng.normal(size=(tokens, 130)).astype(np.float32)
    ids = np.stack([rng.permutation(4)[:3] for _ in range(tokens)])
    rows = None if rows is None else np.array(rows)
    def compute():
        return kernels.expert_ffn(x, ids, np.ones((tokens, 3), np.float32), w, w, down, variant, rows).tobytes()
    results = set()
    for count in (1, 2, 3, 7, 16, 33, 64):
        kernels.set_threads(count)
        results.add(compute())
    kernels.set_threads(1)
    products_call.thread_count, counted = (lambda: 5), products_call.thread_count  # one thread has the work of five
    results.add(compute())
    products_call.thread_count = counted
    assert len(results) == 1, tokens
"""


def test_expert_ffn_gives_the_same_bits_on_1_to_64_threads():
    """In a new process, with more threads than cores: Numba fixes their maximum when it starts."""
    environment = os.environ | {"NUMBA_NUM_THREADS": "64"}
    result = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


TWO_CALLERS = """
import threading, numpy as np
from fiddler import kernels
from fiddler.kernels.machine import threads
threads._PARALLEL_FROM = 0
variant = kernels.KernelVariant(kernels.choose_tier("portable"), "bf16", "f32")
w, x = np.full((300, 64), 0x3F80, np.uint16), np.ones((3, 64), np.float32)
kernels.linear(x, w, variant)
assert kernels.threading_layer() == "workqueue", kernels.threading_layer()
results = []
def call():
    results.extend(kernels.linear(x, w, variant) for _ in range(200))
callers = [threading.Thread(target=call) for _ in "ab"]
[caller.start() for caller in callers]
[caller.join() for caller in callers]
assert len(results) == 400 and all((y == 64).all() for y in results)
"""


def test_two_threads_may_call_kernels_at_once_without_openmp():
    """Numba's own thread pool ends the process when two threads use it: our functions admit one at a time."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    result = subprocess.run([sys.executable, "-c", TWO_CALLERS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_default_threads_are_physical_cores_within_affinity_and_cgroup_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 6})
    monkeypatch.setattr(threads, "_CPUS", tmp_path)
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    for cpu, siblings in {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 6: "2,6"}.items():
        (tmp_path / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(siblings + "\n")
    assert threads.usable_cores() == 4
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert threads.usable_cores() == 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert threads.usable_cores() == 4


def test_threads_out_of_range_are_refused():
    for count in (0, -1, 10**6):
        with pytest.raises(RequestError, match=str(count)):
            kernels.set_threads(count)


def test_each_python_thread_has_its_own_thread_count_and_numba_follows():
    counts = []

    def in_another_thread():
        counts.append(kernels.thread_count())
        counts.append(kernels.set_threads(1))
        counts.append(numba.get_num_threads())

    kernels.set_threads(None)
    before = kernels.thread_count()
    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert counts[1:] == [1, 1]
    assert kernels.thread_count() == numba.get_num_threads() == before
    with threads.threads_for(0) as count:
        assert count == numba.get_num_threads() == 1
    assert numba.get_num_threads() == before


def test_ctrl_c_while_the_thread_count_changes_leaves_no_wrong_count(monkeypatch):
    """It comes between Numba's change of the count and our record of it; the next step runs on the right number."""
    kernels.set_threads(None)
    default_threads, set_num_threads = kernels.thread_count(), numba.set_num_threads
    if default_threads == 1:
        pytest.skip("one core: nothing is ever set")

    def interrupted(count):
        set_num_threads(count)
        raise KeyboardInterrupt

    monkeypatch.setattr(numba, "set_num_threads", interrupted)
    with pytest.raises(KeyboardInterrupt), threads.threads_for(0):
        pass
    monkeypatch.undo()
    assert kernels.thread_count() == numba.get_num_threads()
    kernels.set_threads(None)
    assert numba.get_num_threads() == default_threads
