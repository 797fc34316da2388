"""Measured costs: cached on disk, read again, ignored where the file is damaged."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from math import inf
from types import SimpleNamespace

import pytest

from fiddler.device.weight_copy import BounceBufferCopy, HostCopy, PinnedCopy
from fiddler.offload import expert_timing
from fiddler.offload.calibration import Calibration, cache_folder, stored
from fiddler.offload.cost_benchmark import _machine, calibrated, measure
from fiddler.offload.plan import make_plan
from fiddler.offload.staging_ring import Ring
from oracles.both_sides import EXACT, D, E, F

SOME = Calibration("here", 2, 1000, (1, 4), (1e-3, 2e-3), (9e-4, 2e-3), 0.0, (1, 16), (1e-5, 2e-5), 2e-3, 1e-3)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    monkeypatch.setattr(expert_timing, "_MIN_SECONDS", 1e-3)


def test_costs_are_measured_once_and_then_read_from_the_cache():
    notices = []
    ring = Ring(HostCopy(), EXACT, 128, 3)
    first = calibrated(EXACT, ring, 1, notices.append, k=2)
    assert len(notices) == 1
    assert calibrated(EXACT, ring, 1, notices.append, k=2) == first
    assert len(notices) == 1
    assert stored() == [first]
    assert first.expert_bytes == 6 * D * F
    assert min(*first.cpu_seconds, *first.gpu_seconds, first.copy_seconds, first.copy_alone, *first.cpu_alone) > 0
    # another number of threads, or a machine without a GPU, needs a calibration of its own
    calibrated(EXACT, None, 1, notices.append, k=2)
    assert len(notices) == 2
    assert len(stored()) == 2
    for calibration in stored():
        assert "ms an expert" in calibration.to_text()


def test_a_calibration_holds_for_one_tuning_row_and_one_kind_of_copy():
    measured = calibrated(EXACT, Ring(HostCopy(), EXACT, 128, 3), 1, lambda text: None, k=2)
    assert "the CPU as a GPU, host, torch; " in measured.machine
    assert f"tuned for {EXACT[0].variant.tuning.name}, " in measured.machine
    assert {PinnedCopy.kind, BounceBufferCopy.kind} == {"pinned", "bounce"}  # stored: these stay, whatever the classes


@pytest.mark.parametrize("experts,measured", [(0, None), (1, (1, 1)), (3, (1, 3)), (2 * E + 1, (2, E))])
def test_calibration_reads_no_more_experts_than_fit_into_memory(monkeypatch, experts, measured):
    """experts: as many as fit into a quarter of the memory; 0: the size of the memory is unknown."""
    monkeypatch.setattr(expert_timing, "available_memory", lambda: 4 * experts * 6 * D * F)
    layers, count = expert_timing._in_memory(EXACT)
    assert (len(layers), count) == (measured or (len(EXACT), E))


def test_some_experts_of_one_layer_suffice_for_a_calibration(monkeypatch):
    monkeypatch.setattr(expert_timing, "available_memory", lambda: 4 * 3 * 6 * D * F)
    calibration = measure(EXACT, Ring(HostCopy(), EXACT, 128, 3), 1, "here", 2)
    assert min(*calibration.cpu_seconds, *calibration.copy_speeds()) > 0


def test_costs_follow_from_the_measured_seconds():
    costs = SOME.costs()
    assert [costs.cpu(1), costs.cpu(4), costs.gpu(16), costs.copy] == [1e-3, 2e-3, 2e-5, 2e-3]
    assert costs.memory == pytest.approx(1 / (1 / 1e-3 + 1 / 2e-3))
    # one token: a third of the rows is copied, at half the speed of the CPU
    assert sum(make_plan([1], costs, 900, 1).gpu_rows) == pytest.approx(300, abs=1)
    assert replace(SOME, copy_seconds=None, copy_alone=None).costs().copy == inf


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: {**fields, "version": 0},
        lambda fields: {**fields, "cpu_seconds": [0.0, 1.0]},
        lambda fields: {**fields, "cpu_seconds": ["a", 1.0]},
        lambda fields: {**fields, "cpu_tokens": [4, 1]},
        lambda fields: {**fields, "cpu_alone": 1.0},
        lambda fields: {**fields, "cpu_alone": [1.0]},
        lambda fields: {**fields, "copy_split": -1.0},
        lambda fields: {**fields, "cpu_split": None},
        lambda fields: {**fields, "other": 3},
        lambda fields: {**fields, "machine": [1]},
        lambda fields: {**fields, "threads": "2"},
        lambda fields: {**fields, "expert_bytes": 10**400},
        lambda fields: {**fields, "cpu_alone": [inf, 1.0]},
        lambda fields: {**fields, "copy_alone": None, "gpu_tokens": [1]},
        lambda fields: {key: value for key, value in fields.items() if key != "machine"},
        lambda fields: list(fields),
        lambda fields: 3,
    ],
)
def test_a_calibration_that_is_damaged_or_of_another_version_is_ignored(change):
    cache_folder().mkdir(parents=True)
    path = cache_folder() / "calibration-0.json"
    path.write_text(json.dumps(asdict(SOME)))
    assert stored() == [SOME]
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert stored() == []
    for damage in (b"\xff{", b"[" * 100_000, b" " * (2 << 20)):
        path.write_bytes(damage)
        assert stored() == []
    path.unlink()
    os.mkfifo(path)
    assert stored() == []


def test_a_cache_folder_that_cannot_be_written_gives_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notices = []
    calibration = calibrated(EXACT, None, 1, notices.append, k=2)
    assert calibration.threads == 1
    assert "cannot be stored" in notices[-1]


def test_costs_are_those_of_the_memory_for_decoded_experts():
    ring = Ring(HostCopy(), EXACT, 128, 3)
    machines = {
        _machine(EXACT, ring, 1, 2, SimpleNamespace(decoded_bytes=nbytes)) for nbytes in (0, 64 << 20, 384 << 20)
    }
    assert len(machines) == 3
