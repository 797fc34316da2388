"""A forked child: refused in one line where its parent runs kernels, since OpenMP would end it; else as any process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oracles.synthetic import write_random_mixtral

FORK = """
import os, subprocess, sys
import fiddler
from fiddler import kernels
from fiddler.kernels.precompile import precompile

def in_a_child(call):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            print(call())
        except fiddler.FiddlerError as error:
            print("refused:", error)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

path, threads = sys.argv[1], int(sys.argv[2])
def load():
    return fiddler.load(path, device="cpu", threads=threads, context=64)
def answer(engine):
    return engine.generate("The old fiddler", fiddler.Sampling(temperature=0.0), 4, ignore_eos=True).tokens

in_a_child(lambda: answer(load()))  # no kernel has run in the parent
engine = load()
print(answer(engine))
in_a_child(lambda: answer(engine))
in_a_child(lambda: engine.logits([1, 2, 3]))
in_a_child(lambda: "refused: " + str(next(engine.batch([engine.start(fiddler.Request("a", max_tokens=1))]))[1]))
in_a_child(lambda: engine.beam_search("a", 2, 1))
in_a_child(load)
in_a_child(lambda: os.getpid() and "another matter")
subprocess.run(["true"], check=True)
print(answer(engine))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_of_a_process_that_runs_kernels_is_refused_in_one_line(tmp_path, threads):
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this process may use one CPU")
    model = write_random_mixtral(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", FORK, str(model), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    before, loaded, *refused, other, after = done.stdout.splitlines()
    assert before == loaded == after
    assert other == "another matter"
    assert len(refused) == 5
    for line in refused:
        assert line.startswith("refused: this process was forked from one that runs kernels")
        assert "spawn" in line
