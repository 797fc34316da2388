"""Ctrl-C at any moment of a start: exit code 130 and silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.measure_interrupts import outcome

INSTALLED = Path(sys.executable).with_name("fiddler")
BLOCKS = not subprocess.run(["env", "--block-signal=INT", "true"], capture_output=True, check=False).returncode
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


@pytest.fixture
def entry(tmp_path):
    """The command in a folder with a space, with the script that pip writes there, but for `first`, its first line."""

    def write(first="", folder="bin of mine"):
        (tmp_path / folder).mkdir()
        script = "#!/bin/sh\n''':'\n" + f'{first}\nexec \'{sys.executable}\' "$0" "$@"\n'
        script += "'''\nfrom fiddler.__main__ import main\nmain()\n"
        for name, text in (("fiddler", SCRIPT.read_text()), ("fiddler-python", script)):
            (tmp_path / folder / name).write_text(text)
            (tmp_path / folder / name).chmod(0o755)
        return tmp_path / folder / "fiddler"

    return write


@pytest.mark.skipif(not BLOCKS, reason="env blocks no signals here")
def test_ctrl_c_before_python_starts_is_130_and_silence(entry):
    done = subprocess.run([entry("kill -INT $$"), "--version"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("milliseconds", range(0, 64, 4))
def test_ctrl_c_in_the_first_60_ms_of_the_installed_command_is_silence(milliseconds):
    """And 130, or an end by the signal, which shells report as 130."""
    if not BLOCKS or not INSTALLED.exists():
        pytest.skip("fiddler is not installed beside this Python, or env blocks no signals")
    assert outcome([INSTALLED, "run", "-p", "Once"], milliseconds / 1e3) in ("130, silent", "signal, silent")


def test_the_command_runs_from_any_folder_through_links_and_by_python(entry, tmp_path, monkeypatch):
    command, odd = entry(), entry(folder="a=b")
    link = tmp_path / "link"
    link.symlink_to(command)
    monkeypatch.chdir(command.parent)
    for words in (["./fiddler"], ["sh", "fiddler"], [command], [odd], [link], [sys.executable, command]):
        done = subprocess.run([*words, "play it"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Usage: fiddler [OPTIONS]")
        assert "'play it'" in done.stderr


def test_the_command_runs_where_env_blocks_no_signals(entry, tmp_path):
    old = tmp_path / "env"
    old.write_text("#!/bin/sh\necho env: unrecognized option >&2; exit 125\n")
    old.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run([entry(), "--version"], env=os.environ | {"PATH": path}, capture_output=True, check=True)
    assert (done.stdout[:8], done.stderr) == (b"fiddler ", b"")


def test_the_script_of_the_clone_is_what_is_installed():
    if not INSTALLED.exists():
        pytest.skip("fiddler is not installed beside this Python")
    assert INSTALLED.read_text() == SCRIPT.read_text()


def test_a_background_job_of_a_shell_keeps_ignoring_ctrl_c():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from fiddler.cli.interrupts import exit_on_interrupt; exit_on_interrupt()\n"
        "signal.raise_signal(signal.SIGINT); print('goes on')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "goes on\n"
