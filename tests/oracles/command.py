"""Runs `fiddler` as a user does: in a process of its own, with a time limit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

FIDDLER = [sys.executable, "-m", "fiddler"]
PATIENCE = 120  # time limit of a process [seconds]


def run(*arguments, **options):
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run([*FIDDLER, *map(str, arguments)], timeout=PATIENCE, check=False, **options)


def start(*arguments, **environment):
    return subprocess.Popen(
        [*FIDDLER, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


def wait_until(process, happened):
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fails_in_one_line(process, *fragments):
    message = process.stderr.decode()
    assert process.returncode == 1, message
    assert process.stdout == b""
    assert re.fullmatch(r"error: [^\n]+\n", message)
    assert all(fragment in message for fragment in fragments), message
