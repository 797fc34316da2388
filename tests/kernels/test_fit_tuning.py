"""The choice of a tuning row: by measured times, kept on disk, made once for a CPU that is in no family."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fiddler.errors import RequestError
from fiddler.kernels.fit_tuning import compare_rows, fit_unknown_cpu
from fiddler.kernels.machine.tuning import (
    TUNINGS,
    current_tuning,
    damaged_store,
    is_fitted,
    store_tuning,
    tuning_source,
    tuning_store,
)
from oracles.synthetic import write_random_mixtral

ROWS = [TUNINGS[name] for name in ("portable", "zen5", "intel")]
STEADY = {"portable": 1.0, "zen5": 0.9, "intel": 1.1}


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FIDDLER_TUNING", raising=False)
    current_tuning.cache_clear()
    yield
    current_tuning.cache_clear()


def in_a_new_process(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_row_with_the_shortest_times_is_chosen():
    measured = []

    def seconds(row, tokens):
        measured.append((row.name, tokens))
        return STEADY[row.name] * tokens * 1e-3

    fit = compare_rows(ROWS, (1, 64), seconds)
    assert (fit.row.name, fit.before.name) == ("zen5", "portable")
    assert fit.ratios["zen5"] == pytest.approx((0.9, 0.9))
    assert len({measured.count((row.name, 64)) for row in ROWS}) == 1
    assert "zen5 suits" in fit.to_text()
    assert "64: 1.100" in fit.to_text()


@pytest.mark.parametrize(("ratio", "chosen"), [(0.985, "portable"), (0.975, "zen5"), (1.5, "portable")])
def test_the_row_in_place_stays_unless_another_is_faster_by_two_percent(ratio, chosen):
    times = STEADY | {"zen5": ratio}
    assert compare_rows(ROWS, (1,), lambda row, tokens: times[row.name]).row.name == chosen


def test_a_row_is_chosen_by_its_mean_over_the_numbers_of_tokens():
    times = {("zen5", 1): 0.8, ("zen5", 64): 1.3, ("intel", 1): 0.95, ("intel", 64): 0.95}
    fit = compare_rows(ROWS, (1, 64), lambda row, tokens: times.get((row.name, tokens), 1.0))
    assert fit.row.name == "intel"


@pytest.mark.parametrize("delayed", ["portable", "zen5"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_other_programs_that_delay_one_row_alone_make_no_other_row_faster(delayed, share):
    """Rows of equal speed, of which one is delayed in some or most of the rounds."""
    runs = dict.fromkeys(STEADY, 0)

    def seconds(row, tokens):
        runs[row.name] += 1
        late = row.name == delayed and runs[row.name] % 10 < 10 * share
        return 2e-3 if late else 1e-3

    assert compare_rows(ROWS, (1,), seconds).row.name == "portable"


def test_a_new_process_runs_with_the_stored_row():
    other = "intel" if current_tuning().name.startswith("zen") else "zen5"
    code = "from fiddler import kernels; from fiddler.kernels.machine.tuning import tuning_source\n"
    code += "print(kernels.KernelVariant(kernels.choose_tier(), 'bf16', 'bf16').tuning.name, tuning_source())"
    assert not in_a_new_process(code)[0].startswith(f"{other} ")
    store_tuning(TUNINGS[other])
    assert (current_tuning().name, tuning_source()) == (other, "fitted")
    assert in_a_new_process(code) == [f"{other} fitted"]
    assert in_a_new_process(code, FIDDLER_TUNING="zen3") == ["zen3 FIDDLER_TUNING"]


def test_a_row_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("FIDDLER_TUNING", "zen9")
    with pytest.raises(RequestError, match="'zen9'"):
        current_tuning()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b'{"here": 3}', b"[" * 100_000, b" " * (2 << 20), None])
def test_a_damaged_store_is_ignored_with_a_line_and_replaced(content):
    row, source = current_tuning(), tuning_source()
    store_tuning(TUNINGS["zen3"])
    assert not damaged_store()
    if content is None:
        tuning_store().unlink()
        os.mkfifo(tuning_store())
    else:
        tuning_store().write_bytes(content)
    current_tuning.cache_clear()
    assert (current_tuning(), tuning_source()) == (row, source)
    if is_fitted():  # else the next line measures
        notices = []
        fit_unknown_cpu(notices.append)
        assert len(notices) == 1
        assert "is damaged and ignored" in notices[0]
    store_tuning(TUNINGS["zen3"])
    assert current_tuning().name == "zen3"
    assert not damaged_store()


def test_a_cache_folder_that_is_a_file_holds_no_fits_and_none_is_damaged(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not damaged_store()
    with pytest.raises(NotADirectoryError):
        store_tuning(TUNINGS["zen3"])


LOAD = """
import sys, fiddler
from fiddler.kernels.machine.tuning import current_tuning, tuning_source
notices = []
engine = fiddler.load(sys.argv[1], device="cpu", notify=notices.append)
assert engine.generate("once", max_tokens=2).text is not None
print(current_tuning().name, tuning_source(), sum("unknown CPU" in text for text in notices))
"""


def test_the_first_start_on_an_unknown_cpu_chooses_a_row_once(tmp_path):
    model = write_random_mixtral(tmp_path / "tiny.gguf")
    unknown = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}  # any CPU runs these instructions
    (first,) = in_a_new_process(LOAD, model, **unknown)
    row = first.partition(" ")[0]
    assert first == f"{row} fitted 1"
    assert row in ("portable", "zen5")
    assert in_a_new_process(LOAD, model, **unknown) == [f"{row} fitted 0"]


def test_an_unknown_cpu_measures_nothing_where_the_choice_cannot_be_kept(tmp_path):
    (tmp_path / "cache").write_text("a file in the folder's place")
    code = "from fiddler.kernels.fit_tuning import fit_unknown_cpu; fit_unknown_cpu(print)\n"
    code += "from fiddler.kernels.machine.tuning import current_tuning; print(current_tuning().name)"
    *notices, name = in_a_new_process(code, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")
    assert name == "portable"
    assert "can be stored" in notices[-1]
    assert not any("unknown CPU" in text for text in notices)
