"""Ctrl-C at any moment of a start: exit code 130 and silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bin" / "fiddler"
READY = """
import os, sys
from fiddler.cli.interrupts import exit_on_interrupt
exit_on_interrupt()
os.write(1, b".")
sys.argv[0] = "fiddler"
from fiddler.__main__ import main
main()
"""
COMMAND = [sys.executable, "-c", READY, "run", "-p", "Once", "-n", "100000", "--ignore-eos"]


def interrupted(seconds, command=COMMAND):
    """Exit code and stderr of a command that gets SIGINT these seconds after its handler was set."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert os.read(process.stdout.fileno(), 1) == b"."
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("seconds", [step * 0.02 for step in range(21)])
def test_ctrl_c_while_fiddler_starts_is_130_and_silence(seconds):
    """0 to 400 ms after the first line of the entry module."""
    assert interrupted(seconds) == (130, b"")


def test_the_entry_imports_nothing_that_takes_time_before_it_sets_the_handler():
    code = (
        "import sys; before = set(sys.modules)\n"
        "from fiddler.cli.interrupts import exit_on_interrupt; import fiddler.__main__\n"
        "print(*sorted(set(sys.modules) - before - {'signal', 'enum'}))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    ours = {"fiddler", "fiddler.__main__", "fiddler.cli", "fiddler.cli.interrupts", "__future__"}
    assert ours - {"__future__"} <= set(done.stdout.split()) | {"fiddler"}
    assert not {name for name in done.stdout.split() if "." in name or name == "typing"} - ours


def test_the_installed_script_handles_ctrl_c_before_it_imports_anything():
    """But what is built in: SIGINT raised at its first import of a file is 130 and silence."""
    code = (
        "import os, signal, sys\n"
        "builtin = sys.builtin_module_names\n"
        "def hook(event, args):\n"
        "    if event == 'import' and args[0] not in builtin: signal.raise_signal(signal.SIGINT)\n"
        "source = compile(open(sys.argv[1]).read(), sys.argv[1], 'exec')\n"
        "sys.addaudithook(hook)\n"
        "exec(source)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, SCRIPT], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_the_script_of_the_clone_is_what_is_installed():
    installed = Path(sys.executable).with_name("fiddler")
    if not installed.exists():
        pytest.skip("fiddler is not installed beside this Python")
    assert installed.read_text().partition("\n")[2] == SCRIPT.read_text().partition("\n")[2]


def test_a_background_job_of_a_shell_keeps_ignoring_ctrl_c():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from fiddler.cli.interrupts import exit_on_interrupt; exit_on_interrupt()\n"
        "signal.raise_signal(signal.SIGINT); print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
