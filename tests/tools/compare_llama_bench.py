"""Speed here and in llama.cpp: `python tests/tools/compare_llama_bench.py MODEL.gguf --llama .../llama-bench`.

Not a test that pytest collects: it needs llama.cpp's `llama-bench`, built elsewhere. Both measure the same file on the
CPU with the same number of threads, in turns, each time in a new process. Ratios are of neighbouring runs: a machine
that others use, too, changes its speed by the minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from fiddler import kernels

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from tools.measure_memory import say_row


def measured(command: list[str], pause: float) -> list[dict]:
    time.sleep(pause)
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} ended with {result.returncode}: {result.stderr[-500:]}")
    return json.loads(result.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="the binary llama-bench")
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of both sides (default: all cores)")
    parser.add_argument("--pause", type=float, default=0, help="seconds of rest before each process (0)")
    arguments = parser.parse_args()
    pause = arguments.pause
    threads = str(kernels.set_threads(arguments.threads))
    sizes = ["-p", str(arguments.p), "-n", str(arguments.n), "-r", "1", "-t", threads, "-o", "json"]
    ours_command = [sys.executable, "-m", "fiddler", "bench", str(arguments.model), "--device", "cpu"]
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for row in measured([*ours_command, *sizes], pause):
            ours.setdefault(row["test"], []).append(row["tokens_per_second"])
        for row in measured([str(arguments.llama), "-m", str(arguments.model), *sizes], pause):
            name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
            theirs.setdefault(name, []).append(row["avg_ts"])
    say_row(["test", "ours t/s", "(min-max)", "llama.cpp t/s", "(min-max)", "ours/llama.cpp", "(min-max)"])
    say_row(["---"] + ["---:"] * 6)
    for name in ours:
        ratios = [one / other for one, other in zip(ours[name], theirs[name], strict=True)]
        cells = []
        for values in (ours[name], theirs[name], ratios):
            cells += [f"{median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}"]
        say_row([name, *cells])


if __name__ == "__main__":
    main()
