"""Measures Python's time in a layer of one token whose missing experts both sides compute, without a GPU.

    taskset -c 1 python tests/tools/measure_layer.py            # caches warm
    taskset -c 1 python tests/tools/measure_layer.py --evict 64 # before each layer 64 MB are read, as weights are

The orchestrator, the ring, `DecodeGraphs` and the CPU's kernels are those of generation; experts are as many as
Qwen3-30B-A3B's but tiny, so that their products take next to nothing. Copies are described and not made, and stand-ins
take the place of graphs, which choose experts at random. Printed: CPU time of the caller's thread [us], which other
programs hardly disturb, medians of `--rounds` rounds (quartiles). Not included: the driver's own time.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import threading
import time
from collections import defaultdict
from ctypes.util import find_library
from pathlib import Path
from statistics import quantiles

import numpy as np
import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.device.c_function import CFunction
from fiddler.device.weight_copy import HostCopy
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.kernels.one_token import JOB
from fiddler.offload.one_token import TokenPlan
from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.plan import Costs
from fiddler.telemetry.recorder import SILENT

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.both_sides import LAYERS, orchestrator, weights_of

US = 1e-6
PHASES = "clock", "plan", "send", "hand over", "kernel", "balance", "open", "between"
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
    """CPU time of the thread that made it, by phase; a phase ends where the next mark is set."""

    def __init__(self) -> None:
        self._thread, self._last = threading.get_ident(), 0
        self.nanoseconds: dict[str, int] = defaultdict(int)

    def mark(self, phase: str) -> None:
        """End a phase."""
        if threading.get_ident() == self._thread:
            now = time.thread_time_ns()
            self.nanoseconds[phase] += now - self._last
            self._last = time.thread_time_ns()


class StandIns:
    """Implements `Graphs`: chooses experts at random, and sends what the GPU is to compute."""

    def __init__(self, experts: Orchestrator, clock: Clock, evict: int) -> None:
        self.breaks, self.hidden, self.chosen = list(range(LAYERS)), torch.zeros(1, WIDTH), ()
        self.x = np.ones((1, WIDTH), np.float32)
        self.expert_ids, self.routing_weights = np.zeros((1, TOP), np.float32), np.ones((1, TOP), np.float32)
        self.cpu_sum = np.zeros((1, WIDTH), np.float32)
        self._ring, self._clock, self._numbers = experts.ring, clock, np.random.default_rng(0)
        token = experts.bind_token(self.x, self.expert_ids, self.routing_weights, self.cpu_sum)
        self._ring.bind_token(token.division, np.zeros((TOP, JOB), np.int64))
        self._arrived = [threading.Event() for _ in range(LAYERS)]
        self._gpu_first = False
        self._evicting = np.ones(evict << 17)
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
        self._clock.mark("between" if graph else "token")
        self._arrived[graph].wait()
        if threading.get_ident() == self._caller:
            self.expert_ids[:] = self._numbers.permutation(EXPERTS)[:TOP]
            self._evicting.sum()
        self._clock.mark("wait")
        self._clock.mark("clock")

    def send(self, layer: int, plan: TokenPlan) -> None:
        """Implements `Graphs.send`."""
        self._clock.mark("hand over")
        assert self._ring.send_token(layer, plan)
        self._clock.mark("send")

    def stream(self) -> None:
        """Implements `Graphs.stream`."""
        self._ring.done_together()

    def streamed(self, layer: int) -> bool:
        """Implements `Graphs.streamed`."""
        self._gpu_first = not self._gpu_first  # keeps the balance where it is
        return self._gpu_first


def timed(target: object, name: str, clock: Clock, before: str, after: str) -> None:
    """Mark the end of a phase before each call of a method, and of another one after it."""
    call = getattr(target, name)

    def marked(*arguments: object) -> object:
        clock.mark(before)
        result = call(*arguments)
        clock.mark(after)
        return result

    setattr(target, name, marked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=40, help="of a round")
    parser.add_argument("--evict", type=int, default=0, help="MB read before each layer")
    arguments = parser.parse_args()
    kernels.set_threads(1)
    layers = weights_of("bf16", "bf16", 0, EXPERTS, HIDDEN, WIDTH)
    placed = [[*range(0, EXPERTS, EXPERTS // RESIDENT)]] * LAYERS
    experts, clock = orchestrator(layers, placed, COSTS, Described(), rows=4 * HIDDEN), Clock()
    decoder = DecodeGraphs(StandIns(experts, clock, arguments.evict), experts, SILENT)
    timed(experts, "split_token", clock, "hand over", "plan")
    timed(experts, "on_cpu", clock, "hand over", "kernel")
    timed(experts.cooperative_step, "open", clock, "balance", "open")
    table, rounds = np.zeros(1, np.int64), defaultdict(list)
    for number in range(arguments.rounds + 1):
        clock.nanoseconds.clear()
        for token in range(arguments.tokens):
            decoder.step(token, token, table)
        if number:  # the first one compiles
            spent = {phase: clock.nanoseconds[phase] / 1e3 / LAYERS / arguments.tokens for phase in PHASES}
            for phase, microseconds in spent.items():
                rounds[phase].append(microseconds)
            rounds["a layer"].append(sum(spent.values()) - spent["clock"])
    for phase, samples in rounds.items():
        low, middle, high = quantiles(samples, n=4)
        print(f"{phase:10} {middle:7.1f} ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
