"""Seconds of a step by batch size, and their ratio to a step of one: `python tests/tools/measure_steps.py MODEL.gguf`.

Not a test that pytest collects: it means something on a model whose weights are larger than the caches. All sequences
have one prefix and then random tokens of their own, as beams that differ: with 16 of them nearly every expert is read.
A step includes the logits of all its rows. Batch sizes take turns, since a machine that others use, too, changes its
speed by the minute. Ratios are those of the medians, and those of the quickest steps.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import median

import fiddler
from fiddler.telemetry.recorder import Meter

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from tools.measure_memory import say_row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--depth", type=int, default=100, help="positions before the steps (100)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--gpu-memory", help="as for `fiddler run`; without it the CPU computes")
    parser.add_argument("--gpu-experts", type=int)
    arguments = parser.parse_args()
    meter, numbers = Meter(), random.Random(0)
    device = "cuda" if arguments.gpu_memory else "cpu"
    engine = fiddler.load(
        arguments.model,
        device=device,
        gpu_memory=arguments.gpu_memory,
        gpu_experts=arguments.gpu_experts,
        context=arguments.depth + 64,
        recorder=meter,
    )
    runner, vocabulary = engine.runner, engine.config.vocab_size
    sequences = [runner.sequence() for _ in range(max(arguments.widths))]
    runner.prefill(sequences[0], [numbers.randrange(vocabulary) for _ in range(arguments.depth)])
    for sequence in sequences[1:]:
        sequence.become(sequences[0])
    seconds: dict[int, list[float]] = {batch_size: [] for batch_size in arguments.widths}
    parts: dict[int, dict[str, list[float]]] = {batch_size: {} for batch_size in arguments.widths}
    for round_number in range(arguments.rounds + 1):
        for batch_size in arguments.widths:
            for sequence in sequences:
                sequence.truncate(arguments.depth)
            for _ in range(3):
                inputs = [(sequence, [numbers.randrange(vocabulary)]) for sequence in sequences[:batch_size]]
                meter.clear()
                started = time.perf_counter()
                runner.step(inputs)
                step_seconds = time.perf_counter() - started
                if round_number:  # the first round maps pages and compiles
                    seconds[batch_size].append(step_seconds)
                    spent = dict(meter.seconds) | {"other": step_seconds - sum(meter.seconds.values())}
                    for name, value in spent.items():
                        parts[batch_size].setdefault(name, []).append(value)
    names = sorted({name for spent in parts.values() for name in spent})
    say_row(["batch", "ms", "(min-max)", "x one", "quickest", *[f"{name} ms" for name in names]])
    say_row(["---:"] * (5 + len(names)))
    one = seconds[arguments.widths[0]]
    for batch_size, samples in seconds.items():
        cells = [f"{batch_size}", f"{median(samples) * 1e3:.1f}", f"{min(samples) * 1e3:.1f}-{max(samples) * 1e3:.1f}"]
        cells += [f"{median(samples) / median(one):.2f}", f"{min(samples) / min(one):.2f}"]
        say_row([*cells, *[f"{median(parts[batch_size].get(name, [0.0])) * 1e3:.1f}" for name in names]])


if __name__ == "__main__":
    main()
