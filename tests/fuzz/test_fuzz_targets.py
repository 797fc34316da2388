"""The fuzzer's targets take their own seeds, and inputs that were findings once; a read behind a tensor is a crash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.draw import Draw, changed_json
from fuzz.parts import parts_target
from fuzz.targets import TARGETS

REFUSED = {  # of each target one seed at least is read, and one input is refused
    "gguf": b"GGUF\3\0\0\0",
    "checkpoint": bytes(40),
    "tokenizer-json": b"{",
    "tokenizer-model": b"\x0a\xff",
    "jobs": b"[]",
    "prompt-cache": bytes(40),
    "body": bytes(40),
}
READ = {"gguf", "tokenizer-json", "tokenizer-model", "jobs"}


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_read_or_refused(name, tmp_path):
    results = [TARGETS[name].run(seed, tmp_path) for seed in TARGETS[name].seeds()]
    assert name not in READ or None in results
    assert TARGETS[name].run(REFUSED[name], tmp_path)


def test_models_that_open_compute_beside_inaccessible_pages(tmp_path):
    target = parts_target(["avx2"])
    assert [target.run(seed, tmp_path) for seed in target.seeds()[:4]] == [None] * 4


def test_a_read_behind_a_tensor_ends_the_process():
    code = (
        "import ctypes, numpy as np\n"
        "from fuzz.guarded_pages import guarded\n"
        "copy = guarded(np.arange(7, dtype=np.uint16))\n"
        "assert copy.tolist() == list(range(7))\n"
        "print('read', flush=True)\n"
        "ctypes.string_at(copy.ctypes.data, copy.nbytes + 1)\n"
    )
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-11, "read\n")


def test_the_same_bytes_make_the_same_changes():
    def changed(data):
        return changed_json(Draw(data), {"a": [1, {"b": None}], "c": "d"}, ("e",))

    data = bytes(range(7, 90))
    assert repr(changed(data)) == repr(changed(data)) != repr(changed(data[3:]))
