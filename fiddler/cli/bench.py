"""The command `bench`: turns options into tests, and prints their results. Measures nothing itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from fiddler.cli.options import (
    Device,
    DeviceOption,
    ExpertCounts,
    GpuExperts,
    GpuMemory,
    Missing,
    MissingOption,
    Output,
    Precision,
    PrecisionOption,
    loading_bar,
    numbers,
    say,
)

__all__ = ["bench"]


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL.gguf", help="Model to measure.")],
    prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt lengths, as 512 or 128,512; 0: none.")] = "",
    count: Annotated[str, typer.Option("-n", "--n-gen", help="Generated lengths, as 128; 0: none.")] = "",
    both: Annotated[str, typer.Option("-pg", help="Prompt and generation in one test, as 512,128.")] = "",
    depth: Annotated[int, typer.Option("-d", "--n-depth", min=0, help="Tokens before each test, not timed.")] = 0,
    repetitions: Annotated[int | None, typer.Option("-r", "--repetitions", min=1, help="Runs per test [3].")] = None,
    threads: Annotated[str, typer.Option("-t", "--threads", help="CPU threads, as 8 or 4,8.")] = "",
    output: Annotated[Output, typer.Option("-o", "--output", help="Output format.")] = Output.md,
    no_warmup: Annotated[bool, typer.Option("--no-warmup", help="Skip the warm-up run before the timed ones.")] = False,
    ctx: Annotated[
        int | None,
        typer.Option("-c", "--ctx", min=1, help="Context size in tokens; as large as the tests need if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random token ids.")] = 0,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemory = None,
    gpu_experts: GpuExperts = None,
    missing: MissingOption = Missing.auto,
    expert_counts: ExpertCounts = None,
    precision: PrecisionOption = Precision.fast,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write a timeline for Perfetto, of the last -t."),
    ] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="Measure the expert kernels alone.")] = False,
    tokens: Annotated[str, typer.Option(help="With --kernels: tokens per expert, as 1,2,8-12.")] = "",
    tiers: Annotated[
        str, typer.Option("--tiers", help="With --kernels: tiers, as avx512,avx2; all if not given.")
    ] = "",
    types: Annotated[str, typer.Option("--types", help="With --kernels: weight types: bf16, f16 or bf16,f16.")] = "",
    png: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="With --kernels: plot the results.")
    ] = None,
) -> None:
    """Measure prompt and generation speed as llama-bench does, and compare it with the memory's read bandwidth."""
    if kernels:
        ignored = {
            "-p": prompt,
            "-n": count,
            "-pg": both,
            "-d": depth,
            "-c": ctx,
            "--gpu-memory": gpu_memory,
            "--trace": trace,
        }
    else:
        ignored = {"--tokens": tokens, "--tiers": tiers, "--types": types, "--plot": png}
    for name, value in ignored.items():
        if value:
            raise typer.BadParameter(f"{name} means nothing {'with' if kernels else 'without'} --kernels")
    thread_counts: list[int | None] = list(numbers("-t", threads)) or [None]
    if kernels:
        if len(thread_counts) > 1:
            raise typer.BadParameter(f"-t {threads}: give one number with --kernels")
        _bench_kernels(model, tiers, types, tokens, repetitions or 7, thread_counts[0], output, png)
        return
    pair = numbers("-pg", both)
    if both and len(pair) != 2:
        raise typer.BadParameter(f"-pg {both}: give two numbers, as 512,128")
    lengths = [(size, 0) for size in numbers("-p", prompt or "512")]
    lengths += [(0, size) for size in numbers("-n", count or "128")]
    lengths = [sizes for sizes in [*lengths, *([(pair[0], pair[1])] if pair else [])] if any(sizes)]
    if not lengths:
        raise typer.BadParameter("nothing to measure: -p and -n are 0")
    _bench_model(
        model,
        lengths,
        depth,
        repetitions or 3,
        thread_counts,
        output,
        not no_warmup,
        ctx,
        seed,
        device,
        precision,
        {
            "gpu_memory": gpu_memory,
            "gpu_experts": gpu_experts,
            "missing": missing.value,
            "expert_counts": expert_counts,
        },
        trace,
    )


def _bench_model(
    model: Path,
    lengths: list[tuple[int, int]],
    depth: int,
    repetitions: int,
    thread_counts: list[int | None],
    output: Output,
    warm_up: bool,
    ctx: int | None,
    seed: int,
    device: Device,
    precision: Precision,
    gpu_options: dict[str, Any],
    trace: Path | None,
) -> None:
    from fiddler.files.model_file import ModelFile

    model_file = ModelFile.open(model)
    model_file.check_runnable()
    from fiddler.evaluation.throughput import Result, Test, measure, to_markdown
    from fiddler.loading import load
    from fiddler.telemetry.gpu_timeline import GpuTracer
    from fiddler.telemetry.recorder import Meter
    from fiddler.telemetry.timeline import Tracer

    tests = [Test(*sizes, depth) for sizes in lengths]
    context = ctx or max(depth + sum(sizes) for sizes in lengths)
    results: list[Result] = []
    timeline: Meter | None = None
    for threads in thread_counts:
        meter = Meter() if trace is None else GpuTracer()
        with loading_bar() as progress:
            engine = load(
                model_file,
                device.value,
                threads=threads,
                context=context,
                precision=precision.value,
                notify=say,
                recorder=meter,
                progress=progress,
                **gpu_options,
            )
        for result in measure(engine, meter, tests, repetitions, warm_up=warm_up, seed=seed):
            say(f"{result.test.name}, {result.threads} threads: {result.tokens_per_second:.2f} tokens/s")
            results.append(result)
        timeline = meter
        del engine  # frees its GPU memory for the next engine
    if output is Output.json:
        import json

        print(json.dumps([result.to_json() for result in results], indent=2))
    else:
        tensors = list(model_file.file.tensors.values())
        parameters = sum(math.prod(tensor.shape) for tensor in tensors)
        print(to_markdown(results, parameters, sum(tensor.nbytes for tensor in tensors)))
    if trace is not None and isinstance(timeline, Tracer):
        import json

        trace.write_text(json.dumps(timeline.to_chrome()))


def _bench_kernels(
    model: Path,
    tiers: str,
    types: str,
    tokens: str,
    repetitions: int,
    threads: int | None,
    output: Output,
    png: Path | None,
) -> None:
    weight_types = types.split(",") if types else ["bf16", "f16"]
    if not set(weight_types) <= {"bf16", "f16"}:
        raise typer.BadParameter(f"--types {types}: give bf16, f16 or both")
    token_counts = numbers("--tokens", tokens or "1,2,4,8,16,32,64,128,256,512")
    if 0 in token_counts:
        raise typer.BadParameter(f"--tokens {tokens}: give 1 or more")
    from fiddler.files.model_file import ModelFile
    from fiddler.kernels import available_tiers, choose_tier

    chosen_tiers = [choose_tier(name) for name in tiers.split(",")] if tiers else list(available_tiers())
    model_file = ModelFile.open(model)
    model_file.check_runnable()
    from tqdm import tqdm

    from fiddler.evaluation.kernel_throughput import kernel_rows, plot, rows_to_markdown

    total = len(weight_types) * len(token_counts) * (len(chosen_tiers) + 2)
    measured = kernel_rows(model_file, chosen_tiers, weight_types, token_counts, repetitions, threads)
    rows = list(tqdm(measured, total=total, desc="kernels", leave=False, disable=None))
    if output is Output.json:
        import json

        print(json.dumps([row.to_json() for row in rows], indent=2))
    else:
        print(rows_to_markdown(rows))
    if png is not None:
        plot(rows, png)
