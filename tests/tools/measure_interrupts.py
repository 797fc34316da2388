"""Ctrl-C at moments of a start: `measure_interrupts.py [--last 300] [--step 4] [--load 12] [--command PATH]`.

A command that is interrupted says nothing and ends with 130, or by the signal, which shells report as 130.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

BUSY = "while True: pass"


def outcome(command, seconds):
    """What a command says and ends with that gets SIGINT these seconds after its exec."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    if errors:
        return f"{process.returncode}, says {errors.decode(errors='replace').strip().splitlines()[-1]:.60}"
    return {130: "130, silent", -signal.SIGINT: "signal, silent"}.get(process.returncode, str(process.returncode))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--last", type=int, default=300, help="last moment [ms]")
    parser.add_argument("--step", type=int, default=4, help="from one moment to the next [ms]")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside it")
    parser.add_argument("--command", type=Path, default=Path(sys.executable).with_name("fiddler"))
    options = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(options.load)]
    outcomes, last = Counter(), {}
    try:
        for moment in range(0, options.last + 1, options.step):
            found = outcome([options.command, "run", "-p", "Once", "-n", "100000", "--ignore-eos"], moment / 1e3)
            outcomes[found] += 1
            last[found] = moment
    finally:
        for process in busy:
            process.kill()
            process.wait()
    for found, count in outcomes.most_common():
        print(f"{count:4} {found}; the last at {last[found]} ms")
    sys.exit(any("silent" not in found for found in outcomes))


if __name__ == "__main__":
    main()
