"""Runs a file's tests of Triton kernels in Triton's interpreter, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_in_interpreter"]

_NOISE = ("DeprecationWarning", "RuntimeWarning")  # NumPy's, of the interpreter's arithmetic


def run_in_interpreter(path: str) -> None:
    """Run the tests of a file with "kernels" in their names. Raises AssertionError with what they print."""
    ignored = [option for kind in _NOISE for option in ("-W", f"ignore::{kind}")]
    command = [sys.executable, "-m", "pytest", "-q", *ignored, "-k", "kernels", path]
    environment, root = {**os.environ, "TRITON_INTERPRET": "1"}, Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stdout[-4000:]
