"""`fiddler bench`: the contract's fields, the bytes it counts against the bytes read, and its refusals."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import fiddler
from fiddler import kernels
from fiddler.errors import RequestError, ResourceError
from fiddler.evaluation import kernel_throughput as bench_kernels, throughput as bench
from fiddler.files.model_file import ModelFile
from fiddler.telemetry.recorder import Meter
from oracles.synthetic import write_random_mixtral

CONTRACT = {
    "test": str,
    "n_prompt": int,
    "n_gen": int,
    "tokens_per_second": float,
    "samples": list,
    "gb_per_second": float,
    "read_bandwidth_gb_per_second": float,
    "device": str,
    "threads": int,
    "model": str,
    "backend": str,
    "threading_layer": str,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("bench") / "model.gguf", context=256)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fiddler", "bench", *map(str, arguments)], capture_output=True, text=True
    )


def test_json_has_the_fields_of_the_contract(model):
    result = run(model, "-p", "8,32", "-n", "4", "-pg", "8,2", "-r", "2", "-t", "1", "-o", "json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["test"] for row in rows] == ["pp8", "pp32", "tg4", "pp8+tg2"]
    for row in rows:
        for name, kind in CONTRACT.items():
            assert isinstance(row[name], kind), name
        assert len(row["samples"]) == 2
        assert min(row["samples"]) <= row["tokens_per_second"] <= max(row["samples"])
        assert row["threads"] == 1
        assert row["backend"] == kernels.choose_tier().name
        assert sum(row["time_shares"].values()) == pytest.approx(1)


def test_the_table_has_one_line_per_test(model):
    result = run(model, "-p", "8", "-n", "2", "-r", "1", "-d", "5")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("|")[6].strip() for line in lines[2:4]] == ["pp8 @ d5", "tg2 @ d5"]
    assert "threading layer" in lines[-1]


def test_counted_bytes_are_those_of_the_weights_that_a_token_reads(model):
    meter = Meter()
    engine = fiddler.load(model, recorder=meter)
    sequence = engine.runner.sequence()
    engine.runner.step([(sequence, [5])])
    file, config = engine.model_file.file, engine.config
    one_expert = sum(file.tensors[f"blk.0.ffn_{part}_exps.weight"].nbytes for part in ("gate", "up", "down"))
    one_expert //= config.expert_count
    assert meter.nbytes["experts"] == config.block_count * config.expert_used_count * one_expert
    attention = sum(t.nbytes for name, t in file.tensors.items() if "attn_" in name and "norm" not in name)
    assert meter.nbytes["dense"] == attention + file.tensors["output.weight"].nbytes
    assert meter.seconds["experts"] > 0


def test_a_benchmark_longer_than_the_context_is_refused(model):
    engine = fiddler.load(model, context=16, recorder=Meter())
    with pytest.raises(RequestError, match="pp16\\+tg1 needs 17"):
        next(bench.measure(engine, Meter(), [bench.Test(16, 1)]))
    result = run(model, "-p", "300", "-n", "0")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: pp300 needs 300 positions; the context is 256")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "x"], "-p x"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-pg", "5"], "-pg 5"),
        (["--tokens", "4"], "--tokens means nothing without --kernels"),
        (["--kernels", "-p", "4"], "-p means nothing with --kernels"),
        (["--kernels", "--types", "q4"], "q4"),
        (["--kernels", "--tokens", "9-3"], "9-3"),
        (["-o", "csv"], "csv"),
    ],
)
def test_wrong_usage_exits_with_code_2_and_names_the_argument(model, arguments, message):
    result = run(model, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_the_kernel_benchmark_refuses_experts_that_fit_the_cpu_cache(model):
    result = run(model, "--kernels")
    assert result.returncode == 1
    assert "give a larger model" in result.stderr


def test_kernel_rows_cover_every_backend_and_token_count_and_can_be_plotted(model, monkeypatch):
    """On a model too small to measure: rows, plot and table fit together, and results are checked."""
    monkeypatch.setattr(bench_kernels, "_CACHES", 0)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda bits, _repetitions: 1e9)  # too few bytes to measure it
    model_file, tier = ModelFile.open(model), kernels.choose_tier()
    rows = list(bench_kernels.kernel_rows(model_file, [tier], ["bf16"], [1, 20], 3))
    assert [(row.backend, row.tokens) for row in rows] == [
        (name, tokens) for tokens in (1, 20) for name in ("reads", "torch", tier.name)
    ]
    experts = model_file.file.tensors["blk.0.ffn_gate_exps.weight"]
    for row in rows:
        assert len(row.seconds) == 3
        assert row.nbytes == 2 * 3 * experts.nbytes // 4
    assert rows[-1].error < 5e-3
    assert bench_kernels.plot(rows).startswith(b"\x89PNG")
    table = bench_kernels.rows_to_markdown(rows).splitlines()
    assert len(table) == 2 + len(rows)


def test_a_kernel_with_wrong_results_gets_no_row(model, monkeypatch):
    monkeypatch.setattr(bench_kernels, "_CACHES", 0)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda bits, _repetitions: 1e9)
    real = kernels.expert_ffn
    monkeypatch.setattr(kernels, "expert_ffn", lambda *args: real(*args) * np.float32(1.02))
    with pytest.raises(RuntimeError, match="against float64"):
        list(bench_kernels.kernel_rows(ModelFile.open(model), [kernels.choose_tier()], ["bf16"], [1], 1))


def test_a_model_smaller_than_the_cpu_cache_is_refused_by_name(model, monkeypatch):
    monkeypatch.setattr(bench_kernels, "last_level_cache", lambda: 1 << 40)
    with pytest.raises(ResourceError, match=r"model\.gguf"):
        list(bench_kernels.kernel_rows(ModelFile.open(model), [], ["bf16"], [1], 1))
