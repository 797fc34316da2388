"""Measures many requests at once, on the GPU or the CPU: batches, shared prefixes, priorities, a growing context.

    python tests/tools/measure_many.py batch MODEL.gguf --requests 512 --prompt 64 --new 32 --gpu-memory 24GiB
    python tests/tools/measure_many.py batch MODEL.gguf --device cpu --parallel 32,128 --requests 256 --new 32
    python tests/tools/measure_many.py prefix MODEL.gguf --long 4096
    python tests/tools/measure_many.py priority MODEL.gguf --requests 256
    python tests/tools/measure_many.py growth MODEL.gguf --long 32000 --gpu-memory 8GiB

Several measures may be named, as `batch,prefix`: they share one loaded model. Prompts are random token ids, each text
is greedy and goes on to its last token, so a batch has the same work each time.
batch: generated tokens a second over all seconds after loading, prompts included; beside the sum of the plans.
prefix: the prompt of a second turn of a chat, beside that of the first and of the new tokens alone; ten requests
    with a common beginning, and how much memory they hold.
priority: seconds to the first token of an interactive request while a batch runs, beside its steps.
growth: a context that grows by pieces, and how many experts are resident meanwhile; needs a second load.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median

import torch

from fiddler.generation.events import Finished, Token
from fiddler.generation.request import Request
from fiddler.loading import load
from fiddler.runtime.block_pool import POSITIONS
from fiddler.sampling.sampler import Sampling

GREEDY = Sampling(temperature=0.0)
PIECE = 1024  # tokens by which a context grows


class Bench:
    """A loaded model, and its steps: seconds, sequences, tokens and resident experts of each."""

    def __init__(self, args, **changes):
        self.args, self.random = args, random.Random(args.seed)
        begun = time.perf_counter()
        options = {"device": args.device, "context": args.ctx, "notify": print}
        if args.device == "cuda":
            options |= {"gpu_memory": args.gpu_memory, "gpu_experts": args.gpu_experts}
        self.engine = load(args.model, **options | changes)
        self.runner, self.steps = self.engine.runner, []
        self.orchestrator = getattr(self.runner, "orchestrator", None)
        print(f"{args.model.name}: {self.engine.where}; loaded in {time.perf_counter() - begun:.1f} s, ", end="")
        print(f"steps of at most {self.runner.chunk} tokens")
        self._step, self.runner.step = self.runner.step, self.timed_step

    def timed_step(self, parts, wanted=None, **options):
        """A step of the runner."""
        begun, planned = time.perf_counter(), self.of_plans()
        output = self._step(parts, wanted, **options)
        seconds, tokens = time.perf_counter() - begun, sum(len(tokens) for _, tokens in parts)
        self.steps.append((seconds, len(parts), tokens, self.residents(), self.of_plans() - planned))
        return output

    def of_plans(self):
        return 0.0 if self.orchestrator is None else self.orchestrator.planned_seconds

    def residents(self):
        return 0 if self.orchestrator is None else len(self.orchestrator.residents)

    def ids(self, count):
        return [self.random.randrange(3, self.engine.config.vocab_size) for _ in range(count)]

    def request(self, prompt, new=1, **options):
        return self.engine.start(Request(prompt, GREEDY, new, ignore_eos=True, **options))

    def planned(self):
        """Seconds that the plans of all steps so far expected; by the measured steps where there are no plans."""
        if self.orchestrator is not None:
            return self.of_plans()
        costs = self.runner.step_seconds()
        return sum(costs(step[2]) for step in self.steps)


def measure_batch(bench):
    args = bench.args
    bench.runner.step_seconds()  # measured once a machine, not part of a batch
    dict(bench.engine.batch([bench.request(bench.ids(args.prompt), 4, reuse=False) for _ in range(4)]))  # compiles
    for parallel in args.parallel:
        requests = [
            bench.request(bench.ids(args.prompt), args.new, reuse=False, priority="batch") for _ in range(args.requests)
        ]
        bench.steps.clear()
        planned, begun = bench.planned(), time.perf_counter()
        outcomes = dict(bench.engine.batch(requests, parallel=parallel))
        seconds = time.perf_counter() - begun
        tokens = sum(len(outcome.tokens) for outcome in outcomes.values())
        planned = bench.planned() - planned
        name = "as many at once as pay" if parallel is None else f"at most {parallel} at once"
        print(f"\nbatch of {args.requests} x ({args.prompt} + {args.new}), {name}: ", end="")
        print(f"{tokens / seconds:.1f} generated tokens/s in {seconds:.1f} s; plans {planned:.1f} s, ", end="")
        print(f"{planned / seconds:.0%} of it; {len(bench.steps)} steps took {sum(s[0] for s in bench.steps):.1f} s")
        for label, steps in (("prompts", [s for s in bench.steps if s[1] != s[2]]), ("one each", bench.steps)):
            steps = [s for s in steps if label == "prompts" or s[1] == s[2]]
            if steps:
                print(f"  {label}: {len(steps)} steps, {sum(s[0] for s in steps):.1f} s, median ", end="")
                print(f"{median(s[0] for s in steps):.3f} s, {max(s[1] for s in steps)} sequences and ", end="")
                print(f"{max(s[2] for s in steps)} tokens at most, residents {steps[0][3]} to {steps[-1][3]}, ", end="")
                print(f"plans {sum(s[4] for s in steps):.1f} s")


def measure_prefix(bench):
    args = bench.args
    chat, new = bench.ids(args.long), 64
    first = bench.request(chat, 16).run()
    turn = [*chat, *first.tokens, *bench.ids(new)]
    second = bench.request(turn, 2).run()
    alone = median(bench.request(bench.ids(new), 2, reuse=False).run().stats.prompt_seconds for _ in range(5))
    print(f"\nprefix: a prompt of {args.long} tokens {first.stats.prompt_seconds:.2f} s; the next turn, ", end="")
    print(f"{second.stats.cached_tokens} of {len(turn)} tokens cached, {second.stats.prompt_seconds:.3f} s: ", end="")
    print(f"{second.stats.prompt_seconds / first.stats.prompt_seconds:.1%} of the first's, ", end="")
    print(f"{second.stats.prompt_seconds / alone:.2f} of {new} new tokens alone")
    common, pool = bench.ids(min(2048, args.long)), bench.runner.pool
    bench.runner.forget()
    before, scheduler, most = pool.used, bench.engine.scheduler(10), 0
    for _ in range(10):
        scheduler.add(bench.request(common + bench.ids(16), 16))
    while not scheduler.idle:
        scheduler.step()
        most = max(most, pool.used - before)
    bench.runner.forget()
    one = -(-len(common) // POSITIONS)
    print(
        f"  ten requests with {len(common)} tokens in common held {most} blocks of {POSITIONS} positions; these ",
        end="",
    )
    print(f"these tokens once are {one}; {pool.used - before} blocks are left afterwards")


def measure_priority(bench):
    args, scheduler = bench.args, bench.engine.scheduler()
    prompt = bench.ids(64)
    alone = bench.request(prompt, 2, reuse=False).run().stats.prompt_seconds
    for _ in range(args.requests):
        scheduler.add(bench.request(bench.ids(args.prompt), 200, reuse=False, priority="batch"))
    samples = []
    while len(samples) < 5:
        for _ in range(6):
            scheduler.step()
        steps = [seconds for seconds, sequences, tokens, *_ in bench.steps[-4:] if sequences == tokens]
        begun, handle, first = time.perf_counter(), scheduler.add(bench.request(prompt, 4, reuse=False)), None
        ended = False
        while not ended:
            events = [event for event in scheduler.step() if event.handle == handle]
            if first is None and any(isinstance(event, Token) for event in events):
                first = time.perf_counter() - begun
            ended = any(isinstance(event, Finished) for event in events)
        if steps:
            samples.append((first, median(steps)))
    scheduler.close()
    first, step = median(s[0] for s in samples), median(s[1] for s in samples)
    print(f"\npriority: first token after {first:.2f} s ({', '.join(f'{s[0]:.2f}' for s in samples)}) beside ", end="")
    print(f"a batch of {args.requests}, whose steps take {step:.2f} s; its prompt alone takes {alone:.2f} s: ", end="")
    print(f"{(first - alone) / step:.2f} steps and its own prompt")


def measure_growth(bench):
    args, ids = bench.args, bench.ids(bench.args.long)

    def grown(other):
        sequence, logits = other.runner.sequence(), []
        for begin in range(0, len(ids), PIECE):
            logits.append(other.runner.prefill(sequence, ids[begin : begin + PIECE]).clone())
        return torch.stack(logits), other.residents()

    begin = bench.residents()
    print(f"\ngrowth: {bench.runner.pool.capacity} blocks of {POSITIONS} positions at first, ", end="")
    logits, least = grown(bench)
    print(f"{bench.runner.pool.capacity} then")
    bench.runner.forget()
    prompt = bench.ids(64)
    for _ in range(40):
        bench.request(prompt, 32, reuse=False).run()
    print(f"growth to {len(ids)} tokens by {PIECE}: residents {begin}, then {least}, later {bench.residents()}")
    bench.engine.close()
    del bench.engine, bench.runner, bench.orchestrator, bench._step
    large = Bench(argparse.Namespace(**vars(args)), gpu_memory=None, gpu_experts=None, precision=args.precision)
    expected, residents = grown(large)
    error = (logits - expected).abs().max() / expected.abs().max()
    last = (logits[-1] - expected[-1]).abs().max() / expected[-1].abs().max()
    print(f"  logits beside those of {residents} residents: largest difference {error:.1e}, of the last {last:.1e}")


MEASURES = {
    "batch": measure_batch,
    "prefix": measure_prefix,
    "priority": measure_priority,
    "growth": measure_growth,
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measures", help="of " + ", ".join(MEASURES))
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--gpu-experts", type=int)
    parser.add_argument("--precision", choices=("fast", "exact"), default="fast")
    parser.add_argument("--ctx", type=int)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--long", type=int, default=4096, help="tokens of a long prompt: of prefix and growth")
    parser.add_argument("--new", type=int, default=32, help="tokens that each request generates")
    parser.add_argument("--parallel", default="auto", help="sequences at once: numbers or auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.parallel = [None if each == "auto" else int(each) for each in args.parallel.split(",")]
    bench = Bench(args, precision=args.precision)
    for name in args.measures.split(","):
        MEASURES[name](bench)


if __name__ == "__main__":
    main()
