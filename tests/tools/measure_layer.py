"""Measures where the time of a token goes whose missing experts both sides compute. Needs a GPU.

    python tests/tools/measure_layer.py MODEL.gguf --resident 0.25

Printed: microseconds of the caller's thread, medians of `--rounds` rounds (quartiles). Of a layer: the wait for the
router's choice, with the division; the CPU's kernel, from there on, with the copies' calls where the worker thread is
busy; what is in between. Of a token: what comes before its layers and after them. "clock" is what a phase takes to
measure.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import defaultdict
from pathlib import Path
from statistics import quantiles

from fiddler.files.model_file import ModelFile
from fiddler.loading import load
from fiddler.telemetry.recorder import Meter

OF_LAYER = "wait", "kernel", "between", "clock"
OF_TOKEN = "before", "begin", "after", "logits", "return"


class Clock:
    """Time of the thread that made it, by phase; a phase ends where the next mark is set."""

    def __init__(self) -> None:
        self._thread, self._last = threading.get_ident(), 0
        self.nanoseconds: dict[str, int] = defaultdict(int)

    def mark(self, phase: str) -> None:
        """End a phase."""
        if threading.get_ident() == self._thread:
            now = time.perf_counter_ns()
            self.nanoseconds[phase] += now - self._last
            self._last = time.perf_counter_ns()

    def divide(self, parts: dict[str, float]) -> None:
        """Take phases of so many seconds out of the one that begins now."""
        for phase, seconds in parts.items():
            self.nanoseconds[phase] += round(seconds * 1e9)
            self._last += round(seconds * 1e9)

    def watch(self, target: object, name: str, before: str, after: str) -> None:
        """End a phase before each call of a method, and another one after it."""
        call = getattr(target, name)

        def marked(*arguments: object) -> object:
            self.mark(before)
            result = call(*arguments)
            self.mark(after)
            return result

        setattr(target, name, marked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts on the GPU")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=40, help="of a round")
    arguments = parser.parse_args()
    model_file = ModelFile.open(arguments.model)
    config = model_file.config
    residents = round(arguments.resident * len(config.sparse_layers) * config.expert_count)
    engine = load(model_file, "cuda", threads=arguments.threads, context=4096, gpu_experts=residents, notify=print)
    runner, numbers, clock, meter = engine.runner, random.Random(0), Clock(), Meter()
    sequence, graphs, experts = runner.sequence(), runner._decoder._graphs, runner.orchestrator
    print(f"{runner.threads} threads")
    clock.watch(graphs, "begin", "before", "begin")
    compute_token = experts.compute_token

    def computed(layer, *arguments):
        clock.mark("between")
        meter.clear()
        plan = compute_token(layer, *arguments)
        clock.divide({"wait": meter.seconds["wait"], "kernel": meter.seconds["experts"]})
        clock.mark("clock")
        return plan

    experts.compute_token, experts._recorder = computed, meter
    clock.watch(graphs, "logits", "after", "logits")
    rounds = defaultdict(list)
    for number in range(arguments.rounds + 1):
        clock.nanoseconds.clear()
        if sequence.length > 1024:
            sequence.truncate(0)
        clock.mark("return")
        begun = time.perf_counter()
        for _ in range(arguments.tokens):
            runner.step([(sequence, [numbers.randrange(3, config.vocab_size)])])
            clock.mark("return")
        seconds = time.perf_counter() - begun
        if number:  # the first one compiles
            for phases, count in ((OF_LAYER, len(graphs.breaks)), (OF_TOKEN, 1)):
                for phase in phases:
                    rounds[phase].append(clock.nanoseconds[phase] / 1e3 / count / arguments.tokens)
            rounds["a layer"].append(sum(rounds[phase][-1] for phase in OF_LAYER))
            rounds["a token"].append(seconds / arguments.tokens * 1e6)
    for phase in (*OF_LAYER, "a layer", *OF_TOKEN, "a token"):
        low, middle, high = quantiles(rounds[phase], n=4)
        print(f"{phase:10} {middle:7.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
