"""Measures a model of many experts on GPU and CPU together against what the machine's links allow, in one process.

    python tests/tools/measure_ceiling.py MODEL.gguf --resident 0.25
    python tests/tools/measure_ceiling.py MODEL.gguf --device cpu --prompts 64     # the CPU on both sides: a rehearsal

Generation: tokens a second, beside a ceiling for the very experts that its tokens chose,

    sum over layers of max(missing bytes / both links together, resident bytes / GPU bandwidth)
        + dense bytes / GPU bandwidth + one round trip a layer

Prompts: "auto" (as `run`) in turns with "cpu" (missing experts on the CPU only) and "stream" (on the GPU only).
And the share of the time that goes into plans.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import torch

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.files.model_file import ModelFile
from fiddler.files.weights import mapped_experts
from fiddler.loading import load
from fiddler.models.architecture import EXPERTS, Role
from fiddler.offload.cost_benchmark import measure
from fiddler.offload.residency import place
from fiddler.offload.staging_ring import slot_rows
from fiddler.telemetry.recorder import SilentRecorder

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/
from oracles.both_sides_runner import runner_of_both_sides

WAYS = ("auto", "cpu", "stream")
PROMPT = 64  # tokens before those that are generated
WARM = 4  # tokens


class Chosen(SilentRecorder):
    """The experts that the routers chose, while `wants_expert_ids`: a list of each layer's, step by step."""

    def __init__(self):
        self.wants_expert_ids = False
        self.expert_ids = []

    def chosen(self, layer, expert_ids):
        """Implements `Recorder.chosen`."""
        if self.wants_expert_ids:
            self.expert_ids.append((layer, sorted(set(expert_ids.reshape(-1).tolist()))))


class PlanClock:
    """Adds up the seconds that an orchestrator spends on plans."""

    def __init__(self, orchestrator):
        self._orchestrator, self._inside = orchestrator, False
        self.seconds = 0.0
        orchestrator.split = self._timed(orchestrator.split)

    def plan_by(self, costs):
        """Plan with these costs from now on."""
        self._orchestrator.plan_by(costs)
        self._orchestrator._plan_again = [self._timed(plan) for plan in self._orchestrator._plan_again]

    def _timed(self, call):
        def timed(*arguments):
            if self._inside:
                return call(*arguments)
            self._inside, begun = True, time.perf_counter()
            try:
                return call(*arguments)
            finally:
                self.seconds += time.perf_counter() - begun
                self._inside = False

        return timed


def _largest(output):
    """The token of a step's largest logit, as a greedy sampler takes it."""
    return int(output.logits[0].numpy().argmax() if output.largest is None else output.largest[0])


def ceiling(layers, dense_bytes, links, gpu, round_trip):
    """Seconds of a token; layers: (missing bytes, resident bytes) of each; links, gpu: bytes a second."""
    experts = sum(max(missing / links, resident / gpu) for missing, resident in layers)
    return experts + dense_bytes / gpu + len(layers) * round_trip


def gpu_bandwidth(device, nbytes):
    """Bytes a second that the GPU reads and writes in a copy within its memory."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / median(_seconds(lambda: target.copy_(source), device) for _ in range(9))


def round_trip(device, width):
    """Seconds in which a float32 vector goes from the GPU to the CPU and back."""
    on_host = torch.zeros(width, pin_memory=device.type == "cuda")
    on_gpu = torch.zeros(width, device=device)

    def both_ways():
        on_host.copy_(on_gpu, non_blocking=True)
        _synchronize(device)
        on_gpu.copy_(on_host, non_blocking=True)

    return median(_seconds(both_ways, device) for _ in range(99))


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(call, device):
    _synchronize(device)
    begun = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - begun


class Bench:
    """A loaded model, its measured costs, and the three ways of computing missing experts."""

    def __init__(self, args):
        self.model_file = ModelFile.open(args.model)
        self.config, self.chosen = self.model_file.config, Chosen()
        layers, experts = len(self.config.sparse_layers), self.config.expert_count
        residents = round(args.resident * layers * experts)
        if args.device == "cuda":
            engine = load(
                *(self.model_file, "cuda", args.gpu_memory, args.threads),
                context=args.ctx,
                gpu_experts=residents,
                notify=print,
                recorder=self.chosen,
            )
            self.runner = engine.runner
        else:
            placed = place(layers, experts, residents)
            rows = slot_rows(mapped_experts(self.model_file, kernels.choose_tier(), exact=False))
            self.runner = runner_of_both_sides(args.model, self.chosen, placed, exact=False, rows=rows, max_tokens=512)
            self.runner.threads = kernels.set_threads(args.threads)
        self.orchestrator = self.runner.orchestrator
        ring, grouped = self.orchestrator.ring, self.orchestrator._gpu_side._grouped
        threads, k = self.runner.threads, self.config.expert_used_count
        self.calibration = measure(self.orchestrator.layers, ring, threads, "this run", k, grouped)
        self.device, self.costs = ring.weight_copy.device, self.calibration.costs()
        self.clock = PlanClock(self.orchestrator)
        self.sequence, self.random = self.runner.sequence(), random.Random(0)

    def way(self, name):
        """Compute missing experts this way from now on, with plans not made before."""
        costs = self.costs
        if name == "cpu":
            costs = replace(costs, copy=inf)
        elif name == "stream":
            costs = replace(costs, cpu=Curve((1,), (1e9,)), cpu_alone=None)
        self.clock.plan_by(costs)

    def ids(self, count):
        return [self.random.randrange(3, self.config.vocab_size) for _ in range(count)]

    def generate(self, count, *, greedy):
        """Seconds of each token, bytes of each layer's experts, token by token, and how many tokens are different.

        greedy: the tokens of the largest logits, which the GPU may take before the caller knows them; else random ones.
        """
        self.way("auto")
        prompt, ids, samples, taken = self.ids(PROMPT), self.ids(1 + WARM + count), [], []
        for counted in (False, True):  # which experts are chosen is read in a second pass: it takes time
            self.sequence.truncate(0)
            self.runner.prefill(self.sequence, prompt)
            token = ids[0]
            self.chosen.wants_expert_ids = counted
            for i in range(WARM + count):
                if i == WARM:
                    self.chosen.expert_ids = []
                begun = time.perf_counter()
                output = self.runner.step([(self.sequence, [token])], greedy=greedy)
                token = _largest(output) if greedy else ids[i + 1]
                if not counted and i >= WARM:
                    samples.append(time.perf_counter() - begun)
                    taken.append(token)
        self.chosen.wants_expert_ids = False
        return samples, self._bytes(), len(set(taken))

    def _bytes(self):
        """(missing, resident) bytes of the experts chosen in each layer, of each token."""
        tokens, layers = [], len(self.orchestrator.layers)
        for layer, expert_ids in self.chosen.expert_ids:
            resident = sum((layer, e) in self.orchestrator.residents for e in expert_ids)
            size = self.orchestrator.layers[layer].expert_bytes
            tokens.append(((len(expert_ids) - resident) * size, resident * size))
        return [tokens[begin : begin + layers] for begin in range(0, len(tokens), layers)]

    def dense_bytes(self):
        """Bytes of all other weights that a token reads."""
        tensors = self.config.tensors(tied=self.model_file.tied)
        skipped = {*EXPERTS} if self.model_file.tied else {*EXPERTS, Role.TOKEN_EMBEDDING}
        names = [name for name, tensor in tensors.items() if tensor.role not in skipped]
        return sum(self.model_file.file.tensors[name].nbytes for name in names)

    def prompt(self, length, repetitions):
        """Seconds of each way, in turns that change their order, and the share of auto's that plans take."""
        ids, samples, planning = self.ids(length), {name: [] for name in WAYS}, []
        for repetition in range(repetitions + 1):  # the first round loads code of torch and the driver
            for name in sorted(WAYS, reverse=repetition % 2 == 1):
                self.way(name)
                self.sequence.truncate(0)
                self.clock.seconds = 0.0
                begun = time.perf_counter()
                self.runner.prefill(self.sequence, ids)
                seconds = time.perf_counter() - begun
                if repetition:
                    samples[name].append(seconds)
                    planning += [self.clock.seconds / seconds] if name == "auto" else []
        return samples, median(planning)


def report_generation(bench, count):
    links = bench.calibration.expert_bytes / bench.costs.memory
    gpu = gpu_bandwidth(bench.device, 1 << (28 if bench.device.type == "cuda" else 24))
    trip, dense = round_trip(bench.device, bench.config.embedding_length), bench.dense_bytes()
    print(f"both links {links / 1e9:.1f} GB/s, GPU {gpu / 1e9:.0f} GB/s, a round trip {trip * 1e6:.0f} us")
    for greedy in (False, True):
        samples, tokens, different = bench.generate(count, greedy=greedy)
        least = median(ceiling(layers, dense, links, gpu, trip) for layers in tokens)
        missing, resident = (median(sum(layer[i] for layer in layers) for layers in tokens) / 1e9 for i in (0, 1))
        print(
            f"a token reads {missing:.2f} GB of missing experts, {resident:.2f} of residents, {dense / 1e9:.2f} beside"
        )
        seconds, kind = median(samples), f"greedy, {different} different ones" if greedy else "random"
        print(f"generation {1 / seconds:.1f} tokens/s ({1 / max(samples):.1f}-{1 / min(samples):.1f}), ", end="")
        print(f"{least / seconds:.0%} of the ceiling's {1 / least:.1f}; {count} tokens, {kind}")


def report_prompts(bench, lengths, repetitions):
    print("\n| prompt | tokens/s | cpu over auto | stream over auto | better side over auto, pairs | plans |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in lengths:
        samples, planning = bench.prompt(length, repetitions)
        auto = samples["auto"]
        over = [median(a / b for a, b in zip(samples[name], auto, strict=True)) for name in ("cpu", "stream")]
        better = min((samples["cpu"], samples["stream"]), key=median)
        pairs = [a / b for a, b in zip(better, auto, strict=True)]
        row = f"{length / median(auto):.1f} | {over[0]:.2f} | {over[1]:.2f} | {min(pairs):.2f}-{max(pairs):.2f}"
        print(f"| {length} | {row} | {planning:.1%} |")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--resident", type=float, default=0.25, help="share of the experts on the GPU")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("-r", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args(arguments)
    bench = Bench(args)
    total = len(bench.orchestrator.layers) * bench.config.expert_count
    print(f"{args.model.name}: {len(bench.orchestrator.residents)} of {total} experts on the GPU")
    print(bench.calibration.to_text())
    report_generation(bench, args.tokens)
    report_prompts(bench, map(int, args.prompts.split(",")), args.r)


if __name__ == "__main__":
    main()
