"""Mixtral files with a tensor an expert, from before April 2024, compute the bits of those with stacks.

The old ones are written by `tools.old_mixtral`; that stacks compute transformers' logits is held elsewhere.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import fiddler
from fiddler import kernels
from fiddler.device.weight_copy import HostCopy
from fiddler.files.inspection import describe, to_text
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import mapped_experts
from fiddler.offload.cost_benchmark import measure
from fiddler.offload.staging_ring import Ring
from fiddler.telemetry.recorder import SILENT
from oracles.both_sides_runner import runner_of_both_sides
from oracles.command import run
from oracles.synthetic import write_random_mixtral
from tools.old_mixtral import write_old_mixtral

LAYERS, EXPERTS = 3, 5


@pytest.fixture(scope="module", params=["bf16", "f16"])
def paths(request, tmp_path_factory):
    """The file with stacks, the old one of the same weights."""
    folder = tmp_path_factory.mktemp("old")
    shape = {"layers": LAYERS, "d": 64, "f": 160, "experts": EXPERTS, "dtype": request.param}
    new = write_random_mixtral(folder / "new.gguf", **shape)
    return new, write_old_mixtral(new, folder / "old.gguf", router=False)


def ids_of(length, seed=0):
    return torch.randint(0, 512, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def equal(runs):
    for theirs, ours in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_prompts_give_the_same_bits(paths, precision):
    engines = [fiddler.load(path, device="cpu", precision=precision) for path in paths]
    for length in (1, 5, 17, 40, 200):
        equal([[engine.logits(ids_of(length))] for engine in engines])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_decode_steps_of_several_sequences_give_the_same_bits(paths, precision, batch_size, compiled, monkeypatch):
    runs = []
    for path in paths:
        runner, outputs = fiddler.load(path, device="cpu", precision=precision).runner, []
        assert runner._decoder is not None
        if not compiled:
            monkeypatch.setattr(runner, "_decoder", None)
        sequences = [runner.sequence() for _ in range(batch_size)]
        for n, sequence in enumerate(sequences):
            runner.prefill(sequence, ids_of(2 + n, n))
        for token in range(4):
            outputs += runner.step([(sequence, [10 * n + token]) for n, sequence in enumerate(sequences)])[:2]
        runs.append(outputs)
    equal(runs)


@pytest.mark.parametrize("placed", [[[], [], []], [[0, 4], [], [1, 2, 3]], [list(range(EXPERTS))] * LAYERS])
@pytest.mark.parametrize("rows", [64, 640])
def test_residents_streamed_rows_and_the_cpus_rows_give_the_same_bits(paths, placed, rows):
    runs = []
    for path in paths:
        runner, outputs = runner_of_both_sides(path, SILENT, placed, rows=rows), []
        sequence = runner.sequence()
        for length in (1, 30, 90, 1):
            outputs += runner.step([(sequence, ids_of(length, length))])[:2]
        runs.append(outputs)
    equal(runs)


def test_costs_are_measured_with_the_experts_of_an_old_file(paths):
    layers = mapped_experts(ModelFile.open(paths[1]), kernels.choose_tier(), exact=True)
    calibration = measure(layers, Ring(HostCopy(), layers, 128, 3), 1, "here", 2)
    assert calibration.expert_bytes == 3 * 64 * 160 * 2
    assert min(*calibration.cpu_seconds, *calibration.copy_speeds()) > 0


def test_inspect_says_how_experts_are_stored_and_everything_else_is_as_of_the_new_file(paths):
    new, old = (describe(path) for path in paths)
    assert old["runnable"] is True
    assert (new["architecture"].pop("one_tensor_an_expert"), old["architecture"].pop("one_tensor_an_expert")) == (
        False,
        True,
    )
    new["architecture"]["sliding_window"] = None
    assert old["architecture"] == new["architecture"]
    for key in ("weights", "experts", "dense", "one_expert", "experts_read_per_token"):
        assert old["bytes"][key] == new["bytes"][key]
    assert len(old["tensors"]) - len(new["tensors"]) == 3 * LAYERS * (EXPERTS - 1)
    texts = [to_text(describe(path)) for path in paths]
    assert ["one tensor an expert" in text for text in texts] == [False, True]


def test_the_command_line_generates_and_measures_the_same(paths, tmp_path):
    texts = [run("run", path, "-p", "Once", "-n", "8", "--temp", "0", "--device", "cpu").stdout for path in paths]
    assert texts[0] == texts[1] != b""
    measured = run("bench", paths[1], "-p", "8", "-n", "2", "-r", "1", "--device", "cpu")
    assert measured.returncode == 0, measured.stderr
    assert b"pp8" in measured.stdout


def test_a_float16_file_with_a_float16_router_runs_as_what_convert_makes_of_it(tmp_path):
    """convert.py stored every matrix as float16, the router's, too; `convert` keeps its values."""
    new = write_random_mixtral(tmp_path / "new.gguf", dtype="f16", window=77)
    old = write_old_mixtral(new, tmp_path / "old.gguf")
    model_file = ModelFile.open(old)
    assert model_file.file.tensors["blk.0.ffn_gate_inp.weight"].type == "F16"
    keys = model_file.file.metadata.keys()
    assert not keys & {"llama.vocab_size", "llama.attention.key_length", "tokenizer.ggml.pre"}
    report = fiddler.convert(old, tmp_path / "stacked.gguf")
    assert (report.dtype, report.warnings) == ("f16", ())
    assert not ModelFile.open(report.path).single_experts
    engines = [fiddler.load(path, device="cpu") for path in (report.path, old)]
    equal([[engine.logits(ids_of(50))] for engine in engines])
    assert engines[0].tokenizer.encode("Once upon a time") == engines[1].tokenizer.encode("Once upon a time")


def test_an_old_file_in_parts_gives_the_same_bits(paths, tmp_path):
    write_old_mixtral(paths[0], tmp_path / "old.gguf", router=False, split=9)
    parts = sorted(tmp_path.glob("old-*.gguf"))
    assert len(parts) > 5
    equal([[fiddler.load(path, device="cpu").logits(ids_of(40))] for path in (paths[0], parts[0])])


RSS = """
import sys, torch, fiddler
engine = fiddler.load(sys.argv[1], device="cpu")
engine.logits(list(range(3, 40)))
engine.generate("Once", fiddler.Sampling(temperature=0.0), max_tokens=4)
status = open("/proc/self/status").read()
print(status.split("RssAnon:")[1].split()[0])
"""


def test_an_old_file_takes_no_memory_of_the_process_for_its_experts(tmp_path):
    """Their 75 MB stay in the mapping."""
    new = write_random_mixtral(tmp_path / "new.gguf", layers=2, d=512, f=1536, experts=8)
    old = write_old_mixtral(new, tmp_path / "old.gguf")
    anonymous = []
    for path in (new, old):
        child = subprocess.run([sys.executable, "-c", RSS, path], capture_output=True, text=True, check=True)
        anonymous.append(int(child.stdout) * 1024)
    assert describe(old)["bytes"]["experts"] > 75e6
    assert np.diff(anonymous)[0] < 10e6
