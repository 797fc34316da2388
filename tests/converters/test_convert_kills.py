"""Conversions killed with SIGKILL at random moments leave nothing; `tools/measure_kills.py` kills larger ones."""

from __future__ import annotations

import pytest

from tools.measure_kills import kills, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills") / "hf"
    write_checkpoint(folder, 100_000_000)
    return folder


def test_a_killed_conversion_leaves_no_file(checkpoint, tmp_path):
    in_time = 0
    for running, moment, left in kills(tmp_path / "out", checkpoint, 5, seed=1, earliest=0.5):
        in_time += running
        assert left == {}, f"after {moment:.2f} s"
    assert in_time


def test_where_all_files_have_names_the_next_conversion_removes_what_a_killed_one_left(checkpoint, tmp_path):
    """At most one temporary file is there after any number of kills."""
    in_time = 0
    for running, _, left in kills(tmp_path / "out", checkpoint, 4, seed=2, named=True, earliest=0.5):
        in_time += running
        assert all(name.startswith(".out.gguf.") and name.endswith(".tmp") for name in left)
        assert len(left) <= 1
    assert in_time
