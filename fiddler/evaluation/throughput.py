"""Prompt and generation speed of a loaded model, as llama-bench measures it, beside the memory's bandwidth."""

from __future__ import annotations

import mmap
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from fiddler import kernels
from fiddler.engine import Engine
from fiddler.errors import RequestError
from fiddler.host_memory import available_memory
from fiddler.telemetry.recorder import Meter
from fiddler.telemetry.timeline import Tracer

__all__ = ["Result", "Test", "measure", "plain_reads", "to_markdown"]

_OWN = 1 << 29  # size of the buffer for plain reads [bytes]
_ENOUGH = 1 << 29  # size from which the model's largest tensor is read as well [bytes]


@dataclass(frozen=True)
class Test:
    """`n_prompt` tokens as a prompt, then `n_gen` one by one, after `depth` tokens that are not timed."""

    n_prompt: int
    n_gen: int
    depth: int = 0

    @property
    def name(self) -> str:
        """As llama-bench calls it: pp512, tg128, pp512+tg128, tg128 @ d1024."""
        parts = [f"{kind}{count}" for kind, count in (("pp", self.n_prompt), ("tg", self.n_gen)) if count]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Result:
    """One line of the table. Speeds are medians; bytes count the weights that were read."""

    test: Test
    samples: list[float]  # tokens a second
    gb_per_second: float
    read_bandwidth_gb_per_second: float
    shares: dict[str, float]  # of the time: experts, dense, other
    idle: float | None  # share of the time without reads of weights or work of a GPU; None without a timeline
    device: str
    threads: int
    model: str
    backend: str
    threading_layer: str

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return median(self.samples)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `bench -o json`."""
        return {
            "test": self.test.name,
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.test.depth,
            "tokens_per_second": self.tokens_per_second,
            "samples": self.samples,
            "gb_per_second": self.gb_per_second,
            "read_bandwidth_gb_per_second": self.read_bandwidth_gb_per_second,
            "time_shares": self.shares,
            **({} if self.idle is None else {"idle_share": self.idle}),
            "device": self.device,
            "threads": self.threads,
            "model": self.model,
            "backend": self.backend,
            "threading_layer": self.threading_layer,
        }


def measure(
    engine: Engine, meter: Meter, tests: Sequence[Test], repetitions: int = 3, *, warm_up: bool = True, seed: int = 0
) -> Iterator[Result]:
    """Run each test `repetitions` times, after one run that does not count; token ids are random, as llama-bench's are.

    `meter` is the recorder that the engine was loaded with; the timeline of a `Tracer` also gives the idle share.
    Raises RequestError where a test does not fit the engine's context.
    """
    for test in tests:
        needed = test.depth + test.n_prompt + test.n_gen
        if needed > engine.context:
            raise RequestError(f"{test.name} needs {needed} positions; the context is {engine.context}")
    read = plain_reads(engine)
    if warm_up:  # every page is mapped, as llama.cpp's are when it has loaded a file
        for name in engine.model_file.file.tensors:
            engine.model_file.file.stored(name).reshape(-1)[:: mmap.PAGESIZE].max()
    for test in tests:
        if warm_up:
            _run(engine, meter, Test(min(test.n_prompt, engine.runner.chunk), min(test.n_gen, 1)), seed)
        samples, bandwidths, spent, nbytes, by_kind = [], [], 0.0, 0, {"experts": 0.0}
        idle = 0.0
        for repetition in range(repetitions):
            started, seconds = _run(engine, meter, test, seed + repetition)
            idle += meter.idle(started, started + seconds) if isinstance(meter, Tracer) else 0.0
            # after the test: some shared machines slow down a process that has just read much
            bandwidths.append(read())
            samples.append((test.n_prompt + test.n_gen) / seconds)
            spent, nbytes = spent + seconds, nbytes + sum(meter.nbytes.values())
            for name, seconds in meter.seconds.items():
                by_kind[name] = by_kind.get(name, 0.0) + seconds
        shares = {name: value / spent for name, value in by_kind.items()}
        shares["other"] = 1 - sum(shares.values())
        yield Result(
            test,
            samples,
            nbytes / spent / 1e9,
            median(bandwidths) / 1e9,
            shares,
            idle / spent if isinstance(meter, Tracer) else None,
            engine.device,
            engine.runner.threads,
            str(engine.model_file.file.path),
            engine.backend,
            kernels.threading_layer() or "none",
        )


def plain_reads(engine: Engine) -> Callable[[], float]:
    """A function that measures plain reads by the engine's threads, the best of several [bytes/s].

    It reads the largest weights in the mapping and a buffer of its own, and takes the faster. The bandwidth of a shared
    machine changes by the second: measure it beside the speed that is compared with it.
    """
    name = max(engine.model_file.file.tensors.values(), key=lambda tensor: tensor.nbytes).name
    mapped = engine.model_file.file.stored(name)
    buffer = np.ones(max(min(_OWN, available_memory() // 4), 1 << 20) // 8, np.uint64)
    sources = [buffer] if mapped.nbytes < _ENOUGH else [buffer, mapped]

    def read() -> float:
        kernels.set_threads(engine.runner.threads)
        return max(kernels.read_bandwidth(source, 3) for source in sources)

    return read


def _run(engine: Engine, meter: Meter, test: Test, seed: int) -> tuple[float, float]:
    """Start of a test, and its duration [s]; `meter` then has only the test's work."""
    numbers, runner = random.Random(seed), engine.runner
    ids = [numbers.randrange(engine.config.vocab_size) for _ in range(test.depth + test.n_prompt + test.n_gen)]
    sequence = runner.sequence()
    if test.depth:
        runner.prefill(sequence, ids[: test.depth])
    meter.clear()
    started = time.perf_counter()
    if test.n_prompt:
        runner.prefill(sequence, ids[test.depth : test.depth + test.n_prompt])
    for token in ids[test.depth + test.n_prompt :]:
        runner.step([(sequence, [token])])
    return started, time.perf_counter() - started


def to_markdown(results: Sequence[Result], parameters: int, nbytes: int) -> str:
    """llama-bench's table, and bytes read a second, their share of the memory's bandwidth, and the spread."""
    heads = ["model", "size", "params", "backend", "threads", "test", "t/s", "min-max", "GB/s", "of reads"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * 2 + " --- |" + " ---: |" * 6]
    for result in results:
        name = result.model.rpartition("/")[2]
        of_reads = result.gb_per_second / result.read_bandwidth_gb_per_second
        cells = [
            name,
            f"{nbytes / 2**30:.2f} GiB",
            f"{parameters / 1e9:.2f} B",
            result.backend,
            str(result.threads),
            result.test.name,
            f"{result.tokens_per_second:.2f}",
            f"{min(result.samples):.2f}-{max(result.samples):.2f}",
            f"{result.gb_per_second:.1f}",
            f"{of_reads:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for result in results:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in result.shares.items())
        idle = "" if result.idle is None else f"; neither weights read nor a GPU at work: {result.idle:.1%}"
        lines.append(f"{result.test.name}, {result.threads} threads, time: {parts}{idle}")
    low, high = (pick(result.read_bandwidth_gb_per_second for result in results) for pick in (min, max))
    lines.append(
        f"plain reads of memory beside the tests: {low:.1f} to {high:.1f} GB/s; "
        f"threading layer {results[0].threading_layer}, device {results[0].device}"
    )
    return "\n".join(lines)
