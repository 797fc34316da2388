"""Measures the phases of a layer of one token whose missing experts both sides compute, on the caller's thread.

    python tests/tools/measure_layer.py MODEL.gguf --resident 0.25   # on a GPU: seconds of the clock
    taskset -c 1 python tests/tools/measure_layer.py                 # without one: CPU time, caches warm
    taskset -c 1 python tests/tools/measure_layer.py --evict 64      # before each layer 64 MB are read, as weights are

Without a GPU the orchestrator, the ring, `DecodeGraphs` and the CPU's kernels are those of generation; experts are as
many as Qwen3-30B-A3B's but tiny, so that their products take next to nothing: Python's time is left. Copies are
described and not made, and stand-ins take the place of graphs, which choose experts at random.
Printed: microseconds a layer, medians of `--rounds` rounds (quartiles). "clock" is what a phase takes to measure.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.c_function import CFunction
from fiddler.device.weight_copy import HostCopy
from fiddler.files.model_file import ModelFile
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.kernels.one_token import JOB
from fiddler.loading import load
from fiddler.offload.one_token import TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs
from fiddler.telemetry.recorder import SILENT

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.both_sides import LAYERS, orchestrator, weights_of

US = 1e-6
PHASES = "clock", "plan", "send", "hand over", "kernel", "open", "between"
EXPERTS, TOP, RESIDENT = 128, 8, 32
HIDDEN = WIDTH = 128
# of experts of Qwen3-30B-A3B, 9.4 MB: an H200 with 16 Intel cores
COSTS = Costs(
    *(Curve((1, 512), (147 * US, 1700 * US)), Curve((1, 512), (10 * US, 50 * US)), 192 * US, 83 * US),
    cpu_alone=Curve((1, 512), (119 * US, 1500 * US)),
    copy_alone=178 * US,
    cpu_split=50 * US,
    copy_split=60 * US,
)


class Described(HostCopy):
    """Copies nothing: on a GPU the copy engine does it. Each copy is a call of C's `fegetround`, which returns 0."""

    def __init__(self) -> None:
        super().__init__()
        self._function = ctypes.CDLL(find_library("m")).fegetround
        self._function.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]

    def copy(self, target: int, source: int, row_bytes: int, rows: int = 1, pitch: int = 0) -> None:
        """Implements `WeightCopy.copy`."""
        self._function(target, source, row_bytes * rows, 0)

    def c_function(self) -> CFunction | None:
        """Implements `WeightCopy.c_function`."""
        return CFunction(ctypes.cast(self._function, ctypes.c_void_p).value or 0, 0)


class Clock:
    """Time of the thread that made it, by phase; a phase ends where the next mark is set."""

    def __init__(self, now: Callable[[], int]) -> None:
        """now: nanoseconds."""
        self._thread, self._last, self._now = threading.get_ident(), 0, now
        self.nanoseconds: dict[str, int] = defaultdict(int)

    def mark(self, phase: str) -> None:
        """End a phase."""
        if threading.get_ident() == self._thread:
            now = self._now()
            self.nanoseconds[phase] += now - self._last
            self._last = self._now()

    def watch(self, target: object, name: str, before: str, after: str) -> None:
        """End a phase before each call of a method, and another one after it."""
        call = getattr(target, name)

        def marked(*arguments: object) -> object:
            self.mark(before)
            result = call(*arguments)
            self.mark(after)
            if after == "wait":
                self.mark("clock")
            return result

        setattr(target, name, marked)

    def watch_all(self, experts: Orchestrator, graphs: object) -> None:
        """Measure every phase of a layer."""
        self.watch(graphs, "wait", "between", "wait")
        self.watch(experts, "split_token", "hand over", "plan")
        self.watch(graphs, "send", "hand over", "send")
        self.watch(experts, "on_cpu", "hand over", "kernel")
        self.watch(experts.cooperative_step, "open", "hand over", "open")


class StandIns:
    """Implements `Graphs`: chooses experts at random, and sends what the GPU is to compute."""

    def __init__(self, experts: Orchestrator, evict: int) -> None:
        self.breaks, self.hidden, self.chosen = list(range(LAYERS)), torch.zeros(1, WIDTH), ()
        self.x = np.ones((1, WIDTH), np.float32)
        self.expert_ids, self.routing_weights = np.zeros((1, TOP), np.float32), np.ones((1, TOP), np.float32)
        self.cpu_sum = np.zeros((1, WIDTH), np.float32)
        self._ring, self._numbers = experts.ring, np.random.default_rng(0)
        token = experts.bind_token(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)
        self._ring.bind_token(token.division, np.zeros((TOP, JOB), np.int64))
        self._arrived = [threading.Event() for _ in range(LAYERS)]
        self._gpu_first, self._evicting = False, np.ones(evict << 17)
        self._caller = threading.get_ident()

    def begin(self, token: int, position: int, table: np.ndarray) -> None:
        """Implements `Graphs.begin`."""
        for event in self._arrived:
            event.clear()
        self.queue(0)

    def queue(self, graph: int) -> None:
        """Implements `Graphs.queue`."""
        if graph < LAYERS:
            self._arrived[graph].set()

    def wait(self, graph: int) -> None:
        """Implements `Graphs.wait`."""
        self._arrived[graph].wait()
        if threading.get_ident() == self._caller:
            self.expert_ids[:] = self._numbers.permutation(EXPERTS)[:TOP]
            self._evicting.sum()

    def send(self, layer: int, plan: TokenPlan) -> None:
        """Implements `Graphs.send`."""
        assert self._ring.send_token(layer, plan)

    def stream(self) -> None:
        """Implements `Graphs.stream`."""
        self._ring.done_together()

    def streamed(self, layer: int) -> bool:
        """Implements `Graphs.streamed`."""
        self._gpu_first = not self._gpu_first  # keeps the balance where it is
        return self._gpu_first


def without_gpu(arguments: argparse.Namespace) -> tuple[Callable[[int], object], Clock, int]:
    """A step of one token with stand-ins, its clock, and its layers."""
    kernels.set_threads(arguments.threads or 1)
    layers = weights_of("bf16", "bf16", 0, EXPERTS, HIDDEN, WIDTH)
    placed = [[*range(0, EXPERTS, EXPERTS // RESIDENT)]] * LAYERS
    experts, clock = orchestrator(layers, placed, COSTS, Described(), rows=4 * HIDDEN), Clock(time.thread_time_ns)
    graphs = StandIns(experts, arguments.evict)
    decoder, table = DecodeGraphs(graphs, experts, SILENT), np.zeros(1, np.int64)
    clock.watch_all(experts, graphs)
    return lambda token: decoder.step(token, token, table), clock, LAYERS


def with_gpu(arguments: argparse.Namespace) -> tuple[Callable[[int], object], Clock, int]:
    """A step of one token of a model on the GPU, its clock, and its layers with missing experts."""
    model_file = ModelFile.open(arguments.model)
    config = model_file.config
    residents = round(arguments.resident * len(config.sparse_layers) * config.expert_count)
    engine = load(model_file, "cuda", threads=arguments.threads, context=4096, gpu_experts=residents, notify=print)
    runner, numbers, clock = engine.runner, random.Random(0), Clock(time.perf_counter_ns)
    sequence, graphs = runner.sequence(), runner._decoder._graphs
    print(f"{runner.threads} threads")

    def step(token: int) -> None:
        if sequence.length > 1024:
            sequence.truncate(0)
        runner.step([(sequence, [numbers.randrange(3, config.vocab_size)])])

    clock.watch_all(runner.orchestrator, graphs)
    return step, clock, len(graphs.breaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="for a GPU; without one, stand-ins")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts on the GPU")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=40, help="of a round")
    parser.add_argument("--evict", type=int, default=0, help="MB read before each layer, without a GPU")
    arguments = parser.parse_args()
    step, clock, layers = (with_gpu if arguments.model else without_gpu)(arguments)
    phases = ("wait", *PHASES) if arguments.model else PHASES
    rounds = defaultdict(list)
    for number in range(arguments.rounds + 1):
        clock.nanoseconds.clear()
        begun = time.perf_counter()
        for token in range(arguments.tokens):
            clock.mark("token")
            step(token)
        seconds = time.perf_counter() - begun
        if number:  # the first one compiles
            spent = {phase: clock.nanoseconds[phase] / 1e3 / layers / arguments.tokens for phase in phases}
            for phase, microseconds in spent.items():
                rounds[phase].append(microseconds)
            rounds["a layer"].append(sum(spent.values()) - spent["clock"])
            rounds["a token"].append(seconds / arguments.tokens / US)
    for phase, samples in rounds.items():
        low, middle, high = quantiles(samples, n=4)
        print(f"{phase:10} {middle:7.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
