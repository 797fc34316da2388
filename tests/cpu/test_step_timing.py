"""The seconds of a step: measured once, found on disk afterwards, damaged files measured again."""

from __future__ import annotations

import json

import pytest

import fiddler
from fiddler.cpu.runner import chunk_of
from fiddler.cpu.step_timing import _plausible
from oracles.synthetic import write_random_mixtral


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("timing") / "tiny.gguf")


@pytest.mark.parametrize(
    "seconds, expected",
    [
        ([1.0, 2.0, 8.0], (1.0, 2.0, 8.0)),
        ([1.0, 700.0, 10.0], (1.0, 8.0, 10.0)),  # eight tokens one by one take 8 s
        ([1.0, 700.0, 700.0], (1.0, 8.0, 32.0)),
        ([5.0, 2.0, 8.0], (2.0, 2.0, 8.0)),
    ],
)
def test_what_other_programs_add_to_a_measured_time_is_bounded(seconds, expected):
    assert _plausible((1, 8, 32), seconds) == expected


def test_a_curve_is_measured_once_and_again_where_its_file_is_damaged(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines = []

    def curve(context=64, precision="fast"):
        lines.clear()
        engine = fiddler.load(path, device="cpu", context=context, precision=precision, notify=lines.append)
        found = engine.runner.step_seconds()
        assert engine.runner.pool.used == 0
        return found, sum("measuring how the time of a step grows" in line for line in lines)

    measured, times = curve()
    assert times == 1
    assert measured.tokens[:7] == (1, 8, 32, 64, 128, 256, 512)
    assert list(measured.seconds) == sorted(measured.seconds)
    assert curve(context=32) == (measured, 0)
    assert curve(precision="exact")[1] == 1  # other kernels
    files = {file: json.loads(file.read_text()) for file in tmp_path.glob("fiddler/step-*.json")}
    assert len(files) == 2
    for damage in ({"seconds": [-1.0] * len(measured.tokens)}, {"setup": "another machine"}, {"tokens": 3}, None):
        for file, content in files.items():
            file.write_text("{" if damage is None else json.dumps(content | damage))
        assert curve()[1] == 1
        assert curve()[1] == 0


def test_a_machine_of_many_cpus_takes_more_tokens_of_a_prompt_at_once_whatever_the_number_of_threads(path, monkeypatch):
    assert [chunk_of(cpus) for cpus in (1, 15, 16, 64)] == [512, 512, 1024, 1024]
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert fiddler.load(path, device="cpu", threads=1).runner.chunk == 1024


def test_no_more_sequences_are_timed_than_the_pool_has_blocks_for(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runner = fiddler.load(path, device="cpu", threads=1).runner
    runner.pool.capacity = 100
    assert runner.step_seconds().tokens == (1, 8, 32, 64)
    assert runner.pool.used == 0


def test_a_curve_that_cannot_be_stored_is_a_warning(path, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fiddler").write_text("a file")
    lines = []
    engine = fiddler.load(path, device="cpu", notify=lines.append)
    assert engine.runner.step_seconds().seconds[0] > 0
    assert any("cannot be stored" in line for line in lines)
