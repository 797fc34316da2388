"""A sample of hostile values over every option; `tools/sweep_options.py` tries them all, and again with a model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWEEP = Path(__file__).parents[1] / "tools" / "sweep_options.py"


def test_hostile_values_of_options_end_in_one_line_before_torch_is_imported():
    command = [sys.executable, SWEEP, "--usage-only", "--every", "83"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.partition(" ")[0]) > 100
