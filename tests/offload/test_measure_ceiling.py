"""The command that measures against the links' ceiling: its formula by hand, and a rehearsal without a GPU."""

from __future__ import annotations

import re

import pytest

from fiddler import kernels
from fiddler.offload import expert_timing
from oracles.synthetic import write_random_mixtral
from tools.measure_ceiling import ceiling, main


def test_the_ceiling_is_the_slower_reader_of_each_layer_and_what_every_token_pays():
    layers = [(400, 100), (0, 1000), (100, 10_000)]  # missing, resident bytes
    assert ceiling(layers, 2000, links=100, gpu=1000, round_trip=0.5) == pytest.approx(4 + 1 + 10 + 2 + 3 * 0.5)


def test_a_rehearsal_on_the_cpu_reports_generation_prompts_and_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expert_timing, "_MIN_SECONDS", 1e-4)
    threads = kernels.thread_count()
    path = write_random_mixtral(tmp_path / "tiny.gguf", experts=5, used=3)
    try:
        main([str(path), "--device", "cpu", "--prompts", "8", "--tokens", "2", "-r", "1", "-t", "1"])
    finally:
        kernels.set_threads(threads)
    output = capsys.readouterr().out
    assert "tiny.gguf: 2 of 10 experts on the GPU" in output
    assert re.search(r"generation [\d.]+ tokens/s .* of the ceiling's [\d.]+", output)
    assert re.search(r"^\| 8 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| [\d.]+-[\d.]+ \| [\d.]+% \|$", output, re.MULTILINE)
