"""Kills `fiddler batch` at random moments and resumes it, on the demo model: every prompt must have one result.

    python tests/tools/kill_batch.py --moments 20

prints the number of results after each kill, and exits 1 where one is missing, twice there, or not as without kills.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

OPTIONS = ["-n", "12", "--seed", "4", "--precision", "exact", "--device", "cpu"]
PATIENCE = 300  # time limit of a process [seconds]


def command(prompts, out):
    return [sys.executable, "-m", "fiddler", "batch", prompts, out, *OPTIONS]


def write_prompts(path, count):
    starts = [
        "Once upon a time",
        "The old fiddler",
        "A cat and a dog",
        "One day, Lily",
        "In a far land there was a king",
    ]
    lines = [{"id": n, "prompt": starts[n % len(starts)], "max_tokens": 4 + n % 9} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kill_once(prompts, out, rng):
    """Kill a run at a random moment, most often while it writes; return whether it was still running."""
    before = out.stat().st_size if out.exists() else 0
    with subprocess.Popen(command(prompts, out), stderr=subprocess.PIPE) as process:
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 3))
        else:
            deadline = time.monotonic() + PATIENCE
            wanted = before + rng.randrange(1, 1000)
            while process.poll() is None and (out.stat().st_size if out.exists() else 0) < wanted:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.05))
        running = process.poll() is None
        process.kill()
    return running


def kill_often(folder, moments, prompts_each, seed, say=lambda text: None):
    """Results after `moments` kills and a last run, and those of one run without kills."""
    rng = random.Random(seed)
    prompts, out, whole = (folder / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write_prompts(prompts, moments * prompts_each)
    subprocess.run(command(prompts, whole), check=True, capture_output=True, timeout=PATIENCE)
    for moment in range(moments):
        running = kill_once(prompts, out, rng)
        text = out.read_bytes() if out.exists() else b""
        cut = "" if text.endswith(b"\n") or not text else ", the last one cut"
        say(f"{moment + 1}: {'killed' if running else 'had ended'}, {text.count(bytes([10]))} results{cut}")
    subprocess.run(command(prompts, out), check=True, capture_output=True, timeout=PATIENCE)
    return results(out), results(whole)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, whole = kill_often(Path(folder), arguments.moments, 25, arguments.seed, print)
    counts = Counter(line["id"] for line in rows)
    expected = {line["id"]: line for line in whole}
    different = [line["id"] for line in rows if line != expected[line["id"]]]
    twice = [identity for identity, count in counts.items() if count > 1]
    print(f"{len(rows)} results of {len(whole)} prompts; twice: {twice}; missing: {sorted(expected - counts.keys())}; ")
    print(f"other than without kills: {different}")
    return 0 if counts == Counter(expected.keys()) and not different else 1


if __name__ == "__main__":
    sys.exit(main())
