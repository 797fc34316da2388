"""Measures generation and prefill on GPU and CPU together: tables on stdout. Random weights of Mixtral's shape will do.

    python tests/tools/measure_gpu.py MODEL.gguf --gpu-memory 24GiB
    python tests/tools/measure_gpu.py MODEL.gguf --gpu-experts 16 --prompts 1,4,16,32,64,128,256,512,1024,2048,4096
    python tests/tools/measure_gpu.py MODEL.gguf --gpu-memory 40GiB

Four ways take turns in one process, on the same tokens: "auto" (as `run`), "cpu" (missing experts on the CPU only),
"stream" (on the GPU only), "torch" (on the CPU through torch's bf16 products, expert by expert, as the original Fiddler
computes them). The ceiling is the bandwidth of memory and PCIe link together, as calibration measures it in this very
process, over the bytes of missing experts. Steps of one token run with `FIDDLER_STREAM_WAITS=1`, so that their parts
can be timed; `measure_ceiling.py` measures them as they run else.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import defaultdict
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from fiddler import kernels
from fiddler.cost_curve import Curve
from fiddler.files.model_file import ModelFile
from fiddler.host_memory import peak_memory
from fiddler.loading import load
from fiddler.offload.cost_benchmark import measure
from fiddler.offload.expert_cache import Residents
from fiddler.telemetry.gpu_timeline import GpuTracer
from fiddler.telemetry.recorder import Meter


class TorchFfn:
    """A replacement of a layer's `ExpertFfn` that computes in torch, on every core."""

    def __init__(self, w):
        self._w, self._tensors = w, []

    def __call__(self, x, expert_ids, routing_weights, cpu_rows, out):
        if not self._tensors:
            w = self._w
            self._tensors = [
                [torch.from_numpy(bits).view(torch.bfloat16) for bits in each] for each in (w.gate, w.up, w.down)
            ]
        torch.set_num_threads(kernels.set_threads(None))
        out[:] = 0
        gate, up, down = self._tensors
        inputs = torch.from_numpy(x).bfloat16()
        for e in [e for e in np.flatnonzero(cpu_rows).tolist() if (expert_ids == e).any()]:
            rows, slots = np.nonzero(expert_ids == e)
            selected = inputs[torch.from_numpy(rows)]
            output = F.linear(F.silu(F.linear(selected, gate[e])) * F.linear(selected, up[e]), down[e]).float().numpy()
            np.add.at(out, rows, output * routing_weights[rows, slots][:, None])


class TorchProducts:
    """A replacement of a layer's `BoundProducts`: not called from compiled code, if there are several threads."""

    def __init__(self, bound, ffn):
        vars(self).update(vars(bound))
        self.parallel, self._ffn = False, ffn

    def __call__(self):
        *inputs, out = (self.arguments[i] for i in (0, 1, 2, 3, 8))
        self._ffn(*inputs, out.reshape(1, -1))
        return True


class Bench:
    """One engine, several ways of computing missing experts."""

    def __init__(self, args):
        os.environ["FIDDLER_STREAM_WAITS"] = "1"  # else kernels wait within the graphs, and their times tell nothing
        self.meter, self.tracer = Meter(), GpuTracer()
        self.resident_speed = 0.0  # of copying the residents to the GPU [bytes/s]
        load_residents = Residents.load

        def timed(residents, placed, weight_copy, progress):
            begun, copied = time.perf_counter(), []
            load_residents(residents, placed, weight_copy, lambda nbytes: (copied.append(nbytes), progress(nbytes)))
            self.resident_speed = sum(copied) / (time.perf_counter() - begun)

        Residents.load = timed
        started = time.perf_counter()
        self.model = ModelFile.open(args.model)
        self.engine = load(
            self.model,
            "cuda",
            args.gpu_memory,
            context=args.ctx,
            threads=args.threads,
            gpu_experts=args.gpu_experts,
            notify=print,
            recorder=self.meter,
        )
        self.loaded = time.perf_counter() - started
        self.runner = self.engine.runner
        self.orchestrator = self.runner.orchestrator
        layers = [] if self.orchestrator._token is None else self.orchestrator._token._layers
        theirs = [TorchFfn(w) for w in self.orchestrator.layers]
        self.ffns = self.orchestrator._on_cpu, theirs
        self.token_layers, ours = layers, [layer._products for layer in layers]
        self.products = ours, [TorchProducts(*each) for each in zip(ours, theirs, strict=False)]
        self.costs = self.orchestrator._costs
        self.calibration = None
        self.ways = ["auto"]
        if len(self.orchestrator.residents) < self.model.config.block_count * self.model.config.expert_count:
            threads = self.runner.threads
            started = time.perf_counter()
            self.calibration = measure(
                self.orchestrator.layers,
                self.orchestrator.ring,
                threads,
                "this run",
                self.model.config.expert_used_count,
                self.orchestrator._gpu_side._grouped,
            )
            self.measured = time.perf_counter() - started
            self.costs = self.calibration.costs()
            self.ways = ["auto", "cpu", "stream", "torch"]
        self.plans = {}
        self.sequence = self.runner.sequence()
        self.random = random.Random(0)

    def way(self, name):
        """Compute missing experts this way from now on; each way keeps its costs, plans and balances."""
        orchestrator = self.orchestrator
        if name not in self.plans:
            costs = self.costs
            if name in ("cpu", "torch"):
                costs = replace(costs, copy=inf)
            elif name == "stream":
                costs = replace(costs, cpu=Curve((1,), (1e9,)), cpu_alone=None)
            orchestrator.plan_by(costs)
            self.plans[name] = orchestrator._costs, orchestrator._plan, orchestrator._plan_again, orchestrator.balances
        (orchestrator._costs, orchestrator._plan, orchestrator._plan_again, orchestrator.balances) = self.plans[name]
        orchestrator._plan_token()
        orchestrator._on_cpu = self.ffns[name == "torch"]
        for layer, products in zip(self.token_layers, self.products[name == "torch"], strict=True):
            layer._products = products

    def record(self, recorder):
        orchestrator, decoder = self.orchestrator, self.runner._decoder
        sides = orchestrator._gpu_side, orchestrator.prefetcher, orchestrator.ring
        for part in (orchestrator, *sides, decoder, decoder._graphs):
            part._recorder = recorder

    def ids(self, count):
        return [self.random.randrange(3, self.model.config.vocab_size) for _ in range(count)]

    def generate(self, count, each=8, warm=2):
        """Seconds of each token each way; of auto also seconds by kind, a token's bytes and its planned seconds.

        Ways take turns, `each` tokens at a time after `warm` others: torch's threads stay busy for a while, and auto
        must not pay for that. The last result: idle fractions of tokens, from a timeline, which costs a little.
        """
        self.sequence.truncate(0)
        self.runner.prefill(self.sequence, self.ids(64))
        samples, seconds_by_kind, nbytes, planned = {name: [] for name in self.ways}, defaultdict(list), 0, 0.0
        idle = []
        for _ in range(max(1, count // each)):
            ids = self.ids(warm + each)
            for name in [*self.ways, "traced"]:
                self.way("auto" if name == "traced" else name)
                self.record(self.tracer if name == "traced" else self.meter)
                self.sequence.truncate(64)
                for i, token in enumerate(ids):
                    self.meter.clear()
                    self.tracer.clear()
                    begun = time.perf_counter()
                    self.runner.step([(self.sequence, [token])]).logits[0].numpy().argmax()
                    seconds = time.perf_counter() - begun
                    if i < warm:
                        continue
                    if name == "traced":
                        idle.append(self.tracer.idle(begun, begun + seconds) / seconds)
                        continue
                    samples[name].append(seconds)
                    if name == "auto":
                        nbytes += sum(self.meter.nbytes.values())
                        for kind in ("experts", "wait"):
                            seconds_by_kind[kind].append(self.meter.seconds[kind])
        self.record(self.meter)
        count = len(samples["auto"])
        if self.calibration:  # by the plans, for that many bytes
            planned = nbytes / count / self.calibration.expert_bytes * self.costs.memory
        return samples, seconds_by_kind, nbytes / count, planned, idle

    def dense(self, repetitions=20):
        """Seconds per token of the captured graphs by themselves: the GPU's time between the layers' experts."""
        graphs, total = self.runner._decoder._graphs._graphs, 0.0
        for graph in graphs:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()
            begin.record()
            for _ in range(repetitions):
                graph.replay()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3 / repetitions
        return total

    def prompt(self, length, repetitions, ways):
        """Seconds of each way, the planned seconds of auto, and the fraction of auto's expert bytes that the CPU read.

        Every other round goes backwards, so that no way always follows the same other one.
        """
        ids = self.ids(length)
        samples = {name: [] for name in self.ways if name in ways}
        planned = cpu_part = 0.0
        for repetition in range(repetitions + 1):  # the first round loads code of torch and the driver
            for name in sorted(samples, reverse=repetition % 2 == 1):
                self.way(name)
                self.sequence.truncate(0)
                self.orchestrator.planned_seconds = 0.0
                self.meter.clear()
                begun = time.perf_counter()
                self.runner.prefill(self.sequence, ids)
                if repetition:
                    samples[name].append(time.perf_counter() - begun)
                if name == "auto":
                    planned = self.orchestrator.planned_seconds
                    cpu_part = self.meter.nbytes["experts"] / max(1, sum(self.meter.nbytes.values()))
        return samples, planned, cpu_part


def spread(samples, scale=1.0):
    return f"{scale / median(samples):.1f} ({scale / max(samples):.1f}-{scale / min(samples):.1f})"


def ratio(samples, others):
    """The median ratio of pairs measured one after the other."""
    return f"{median(a / b for a, b in zip(samples, others, strict=True)):.2f}x"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gpu-memory")
    parser.add_argument("--gpu-experts", type=int)
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--prompts", default="512,2048")
    parser.add_argument("--prompt-ways", default="auto,cpu,stream")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int)
    args = parser.parse_args()
    bench = Bench(args)
    layers, experts = bench.model.config.block_count, bench.model.config.expert_count
    resident = len(bench.orchestrator.residents)
    print(f"{args.model.name}: {layers} layers, {resident} of {layers * experts} experts on the GPU")
    print(f"loaded in {bench.loaded:.1f} s; kernels {bench.engine.backend}, {bench.runner.threads} threads")
    if bench.calibration:
        print(f"{bench.calibration.to_text()}\n  measured in {bench.measured:.1f} s")
        link = bench.calibration.expert_bytes / bench.calibration.copy_alone
        share = bench.resident_speed / link
        print(f"residents came at {bench.resident_speed / 1e9:.1f} GB/s, {share:.0%} of PCIe's {link / 1e9:.1f}")
    by_way, by_kind, nbytes, planned, idle = bench.generate(args.tokens)
    print("\n| generation | tokens/s (spread) | time over auto |\n| --- | ---: | ---: |")
    auto = median(by_way["auto"])
    for name, samples in by_way.items():
        print(f"| {name} | {spread(samples)} | {ratio(samples, by_way['auto'])} |")
    mean = float(np.mean(by_way["auto"]))
    if bench.calibration:
        both = bench.calibration.expert_bytes / bench.costs.memory
        print(f"{nbytes / 1e9:.2f} GB of missing experts a token at {nbytes / mean / 1e9:.1f} GB/s,")
        print(f"{nbytes / mean / both:.0%} of the {both / 1e9:.1f} GB/s of memory and PCIe: {planned * 1e3:.2f} ms")
    dense, kinds = bench.dense(), {kind: median(seconds) for kind, seconds in by_kind.items()}
    print(f"a token takes {auto * 1e3:.2f} ms, the GPU's kernels between experts {dense * 1e3:.2f}; waiting for those")
    print(f"and experts on the CPU take {kinds['wait'] * 1e3:.2f} and {kinds['experts'] * 1e3:.2f} ms (medians)")
    if bench.calibration:
        rest = [total - experts - dense for total, experts in zip(by_way["auto"], by_kind["experts"], strict=True)]
        share = median(part / total for part, total in zip(rest, by_way["auto"], strict=True))
        print(f"neither reading weights nor in those kernels: {median(rest) * 1e3:.2f} ms, {share:.1%} (medians)")
    shares = f"{median(idle):.1%} ({min(idle):.1%}-{max(idle):.1%})"
    print(f"neither weights being read nor the GPU at work, by a timeline: {shares} of a token")
    print("\n| prompt | tokens/s (spread) | cpu over auto | stream over auto | time over plan | read by the CPU |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in map(int, args.prompts.split(",")):
        repetitions = args.r if length > 32 else max(args.r, 9)  # short prompts are cheap, and noisier
        samples, plan, share = bench.prompt(length, repetitions, args.prompt_ways.split(","))
        over = [ratio(samples[name], samples["auto"]) if name in samples else "" for name in ("cpu", "stream")]
        over.append(f"{median(samples['auto']) / plan:.2f}x" if plan else "")
        over.append(f"{share:.0%}")
        print(f"| {length} | {spread(samples['auto'], length)} | {' | '.join(over)} |")
    bench.way("auto")
    bench.sequence.truncate(0)
    full = bench.ids(bench.engine.context - 4)
    bench.runner.prefill(bench.sequence, full)
    for token in bench.ids(4):
        bench.runner.step([(bench.sequence, [token])])
    budget, memory = bench.runner.budget, peak_memory()
    print(
        f"\nafter a full context: {budget.used() / 2**30:.2f} of {budget.total / 2**30:.2f} GiB by the driver's count, "
        f"peak of torch {torch.cuda.max_memory_reserved() / 2**30:.2f}; "
        f"anonymous memory {memory.anonymous / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
