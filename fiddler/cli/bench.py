"""The command `bench`: turns options into tests, and prints their results. Measures nothing itself."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.checked_numbers import MOST_TOKENS, check_threads, numbers
from fiddler.cli.option_groups import OptionGroup, with_options
from fiddler.cli.options import LOADING, Output, loading_bar, open_output, opened, say
from fiddler.load_options import LoadOptions

if TYPE_CHECKING:
    from fiddler.evaluation.throughput import Result
    from fiddler.files.atomic_file import OutputFile
    from fiddler.files.model_file import ModelFile

__all__ = ["KernelTests", "ModelTests", "bench"]


@dataclass(frozen=True)
class ModelTests:
    """Values of the options that say what to measure, as they were typed; some of them are for --kernels too."""

    prompt: str = ""
    count: str = ""
    both: str = ""
    depth: int = 0
    repetitions: int | None = None
    threads: str = ""
    output: Output = "md"
    no_warmup: bool = False
    ctx: int | None = None
    seed: int = 0

    def lengths(self) -> list[tuple[int, int]]:
        """Lengths of prompt and generation [tokens] of each test. Raises BadParameter (usage error) for none."""
        pair = numbers("-pg", self.both)
        if self.both and len(pair) != 2:
            raise typer.BadParameter(f"-pg {self.both}: give two numbers, as 512,128")
        lengths = [(size, 0) for size in numbers("-p", self.prompt or "512")]
        lengths += [(0, size) for size in numbers("-n", self.count or "128")]
        lengths = [sizes for sizes in [*lengths, *([(pair[0], pair[1])] if pair else [])] if any(sizes)]
        if not lengths:
            raise typer.BadParameter("nothing to measure: -p and -n are 0")
        return lengths

    def thread_counts(self) -> list[int | None]:
        """Numbers of threads to measure with. Raises BadParameter (usage error) for a text that is no numbers."""
        return [check_threads(threads) for threads in numbers("-t", self.threads)] or [None]


@dataclass(frozen=True)
class KernelTests:
    """Values of the options of `bench --kernels`, as they were typed."""

    kernels: bool = False
    tokens: str = ""
    tiers: str = ""
    types: str = ""
    png: Path | None = None

    def weight_types(self) -> list[str]:
        """Names of the weights' types. Raises BadParameter (usage error) for others."""
        weight_types = self.types.split(",") if self.types else ["bf16", "f16"]
        if not set(weight_types) <= {"bf16", "f16"}:
            raise typer.BadParameter(f"--types {self.types}: give bf16, f16 or both")
        return weight_types

    def token_counts(self) -> list[int]:
        """Numbers of tokens per expert. Raises BadParameter (usage error) for others."""
        token_counts = numbers("--tokens", self.tokens or "1,2,4,8,16,32,64,128,256,512")
        if 0 in token_counts:
            raise typer.BadParameter(f"--tokens {self.tokens}: give 1 or more")
        return token_counts


_MODEL_TESTS = OptionGroup(
    ModelTests,
    {
        "prompt": typer.Option("-p", "--n-prompt", help="Prompt lengths, as 512 or 128,512; 0: none."),
        "count": typer.Option("-n", "--n-gen", help="Generated lengths, as 128; 0: none."),
        "both": typer.Option("-pg", help="Prompt and generation in one test, as 512,128."),
        "depth": typer.Option("-d", "--n-depth", min=0, max=MOST_TOKENS, help="Tokens before each test, not timed."),
        "repetitions": typer.Option("-r", "--repetitions", min=1, max=10_000, help="Runs per test [3]."),
        "threads": typer.Option("-t", "--threads", help="CPU threads, as 8 or 4,8."),
        "output": typer.Option("-o", "--output", help="Output format."),
        "no_warmup": typer.Option("--no-warmup", help="Skip the warm-up run before the timed ones."),
        "ctx": typer.Option(
            "-c", "--ctx", min=1, help="Context size in tokens; as large as the tests need if not given."
        ),
        "seed": typer.Option(min=0, help="Seed of the random token ids."),
    },
)
_KERNEL_TESTS = OptionGroup(
    KernelTests,
    {
        "kernels": typer.Option("--kernels", help="Measure the expert kernels alone."),
        "tokens": typer.Option(help="With --kernels: tokens per expert, as 1,2,8-12."),
        "tiers": typer.Option("--tiers", help="With --kernels: tiers, as avx512,avx2; all if not given."),
        "types": typer.Option("--types", help="With --kernels: weight types: bf16, f16 or bf16,f16."),
        "png": typer.Option("--plot", metavar="FILE.png", readable=False, help="With --kernels: plot the results."),
    },
)


@with_options(_MODEL_TESTS, LOADING.without("threads", "context"), _KERNEL_TESTS)
def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", readable=False, help="Model to measure.")],
    *,
    tests: ModelTests,
    loading: LoadOptions,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", readable=False, help="Write a timeline for Perfetto, of the last -t."),
    ] = None,
    kernel_tests: KernelTests,
) -> None:
    """Measure prompt and generation speed as llama-bench does, and compare it with the memory's read bandwidth."""
    _check_meaningful(tests, loading, trace, kernel_tests)
    if kernel_tests.kernels:
        with open_output(kernel_tests.png) as plot_file:
            _bench_kernels(model, tests, kernel_tests, plot_file)
    else:
        with open_output(trace) as trace_file:
            _bench_model(model, tests, loading, trace_file)


def _check_meaningful(tests: ModelTests, loading: LoadOptions, trace: Path | None, kernel_tests: KernelTests) -> None:
    """Raise BadParameter (usage error) for options that mean nothing with --kernels, or without it."""
    if kernel_tests.kernels:
        ignored = {
            "-p": tests.prompt,
            "-n": tests.count,
            "-pg": tests.both,
            "-d": tests.depth,
            "-c": tests.ctx,
            "--gpu-memory": loading.gpu_memory,
            "--trace": trace,
        }
    else:
        ignored = {
            "--tokens": kernel_tests.tokens,
            "--tiers": kernel_tests.tiers,
            "--types": kernel_tests.types,
            "--plot": kernel_tests.png,
        }
    for name, value in ignored.items():
        if value:
            with_or_without = "with" if kernel_tests.kernels else "without"
            raise typer.BadParameter(f"{name} means nothing {with_or_without} --kernels")


def _bench_model(model: Path, chosen: ModelTests, loading: LoadOptions, trace: OutputFile | None) -> None:
    thread_counts, lengths = chosen.thread_counts(), chosen.lengths()
    model_file = opened(model)
    model_file.check_runnable()
    from fiddler.evaluation.throughput import Test, measure
    from fiddler.loading import load_engine
    from fiddler.telemetry.gpu_timeline import GpuTracer
    from fiddler.telemetry.recorder import Meter
    from fiddler.telemetry.timeline import Tracer

    tests = [Test(*sizes, chosen.depth) for sizes in lengths]
    context = chosen.ctx or max(chosen.depth + sum(sizes) for sizes in lengths)
    results: list[Result] = []
    timeline: Meter | None = None
    for threads in thread_counts:
        meter = Meter() if trace is None else GpuTracer()
        with loading_bar() as progress:
            options = replace(loading, threads=threads, context=context)
            engine = load_engine(model_file, options, notify=say, recorder=meter, progress=progress)
        for result in measure(
            engine, meter, tests, chosen.repetitions or 3, warm_up=not chosen.no_warmup, seed=chosen.seed
        ):
            say(f"{result.test.name}, {result.threads} threads: {result.tokens_per_second:.2f} tokens/s")
            results.append(result)
        timeline = meter
        del engine  # frees its GPU memory for the next engine
    _print_results(results, model_file, chosen.output)
    if trace is not None and isinstance(timeline, Tracer):
        trace.write(json.dumps(timeline.to_chrome()).encode())


def _print_results(results: Sequence[Result], model_file: ModelFile, output: Output) -> None:
    from fiddler.evaluation.throughput import to_markdown

    if output == "json":
        print(json.dumps([result.to_json() for result in results], indent=2))
    else:
        tensors = list(model_file.file.tensors.values())
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        print(to_markdown(results, parameters, sum(tensor.nbytes for tensor in tensors)))
    sys.stdout.flush()  # before a trace, which may go there, too


def _bench_kernels(model: Path, options: ModelTests, kernel_tests: KernelTests, plot_file: OutputFile | None) -> None:
    thread_counts = options.thread_counts()
    if len(thread_counts) > 1:
        raise typer.BadParameter(f"-t {options.threads}: give one number with --kernels")
    weight_types, token_counts = kernel_tests.weight_types(), kernel_tests.token_counts()
    from fiddler.kernels import available_tiers, choose_tier

    tiers = [choose_tier(name) for name in kernel_tests.tiers.split(",")] if kernel_tests.tiers else available_tiers()
    model_file = opened(model)
    model_file.check_runnable()
    from tqdm import tqdm

    from fiddler.evaluation.kernel_throughput import check_plot, kernel_rows, plot, rows_to_markdown

    if plot_file is not None:
        check_plot()

    total = len(weight_types) * len(token_counts) * (len(tiers) + 2)
    repetitions = options.repetitions or 7
    measured = kernel_rows(model_file, tiers, weight_types, token_counts, repetitions, thread_counts[0])
    rows = list(tqdm(measured, total=total, desc="kernels", leave=False, disable=None))
    if options.output == "json":
        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print(rows_to_markdown(rows))
    sys.stdout.flush()  # before a plot, which may go there, too
    if plot_file is not None:
        plot_file.write(plot(rows))
