"""The command `run`: what to continue, how to choose, printing it as it comes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli_beams import (
    Beams,
    EarlyStop,
    EarlyStopOption,
    LengthPenalty,
    NBest,
    beaming_of,
    check_beam_options,
    print_beams,
)
from fiddler.cli_options import (
    Ctx,
    Device,
    DeviceOption,
    ExpertCounts,
    GpuExperts,
    GpuMemory,
    Missing,
    MissingOption,
    ModelOrDemo,
    Precision,
    PrecisionOption,
    Threads,
    loaded,
    say,
)
from fiddler.errors import FiddlerError, RequestError

if TYPE_CHECKING:
    from fiddler.completion import Stats

__all__ = ["run"]

_SAMPLING = ("temp", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "seed")  # what beams do without


def run(
    given: typer.Context,
    model: ModelOrDemo = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    count: Annotated[
        int, typer.Option("-n", "--n-predict", min=-1, help="Tokens to generate; -1: until the end or --ctx.")
    ] = -1,
    temp: Annotated[float, typer.Option(help="Temperature; 0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 or less: all.")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep the fewest tokens that reach this probability; 1: all.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Keep tokens this probable, relative to the first; 0: all.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option(help="Penalty on tokens seen lately; 1: none.")] = 1.0,
    repeat_last_n: Annotated[int, typer.Option(min=-1, help="How many tokens are lately; -1: all.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never choose an end token.")] = False,
    beams: Beams = None,
    n_best: NBest = 1,
    length_penalty: LengthPenalty = 1.0,
    early_stopping: EarlyStopOption = EarlyStop.false,
    prompt_cache: Annotated[
        Path | None, typer.Option(help="File that keeps what was computed of the prompt, for the next run.")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and memory to stderr.")] = False,
    seed: Annotated[int, typer.Option(min=-1, help="Seed of the sampling; -1: a new one each time.")] = -1,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemory = None,
    gpu_experts: GpuExperts = None,
    missing: MissingOption = Missing.auto,
    expert_counts: ExpertCounts = None,
    threads: Threads = None,
    ctx: Ctx = None,
    precision: PrecisionOption = Precision.fast,
) -> None:
    """Continue a text. Without MODEL.gguf: the small demo model that ships with fiddler."""
    check_beam_options(given, beams, n_best, _SAMPLING)
    beaming = None if beams is None else beaming_of(beams, length_penalty, early_stopping)
    text = _prompt_text(prompt, prompt_file)
    from fiddler.sampling import Sampling

    try:
        sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, repeat_last_n, None if seed < 0 else seed)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None
    engine = loaded(
        model,
        ctx,
        device=device.value,
        gpu_memory=gpu_memory,
        gpu_experts=gpu_experts,
        missing=missing.value,
        expert_counts=expert_counts,
        threads=threads,
        precision=precision.value,
    )
    limit = None if count < 0 else count
    if prompt_cache is not None and callable(signal.getsignal(signal.SIGINT)):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a half-written file must be removed
    if beaming is not None:
        took = print_beams(
            engine,
            text,
            beaming,
            limit,
            n_best,
            stop=stop or (),
            ignore_eos=ignore_eos,
            prompt_cache=prompt_cache,
            stats=stats,
        )
        if stats:
            say(f"{engine.where} | {_stats_text(took)}")
        return
    generation = engine.start(text, sampling, limit, stop=stop or (), ignore_eos=ignore_eos, prompt_cache=prompt_cache)
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if stats:
        say(f"{engine.where} | {_stats_text(generation.completion.stats)}")


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str:
    """The prompt from -p, a file or standard input; wrong usage where there is none or more than one.

    As with llama.cpp one newline at the end of a file is not part of it: `echo` and editors put it there. Bytes that
    are no UTF-8 reach the tokenizer as they are.
    """
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give -p or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        try:
            given = prompt_file.read_bytes()
        except OSError as error:
            raise FiddlerError(f"{prompt_file}: cannot be read: {error.strerror}") from None
    elif sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give -p TEXT, --prompt-file FILE, or a text on standard input")
    else:
        given = sys.stdin.buffer.read()
    return given.removesuffix(b"\n").decode("utf-8", "surrogateescape")


def _stats_text(stats: Stats) -> str:
    cached = f" ({stats.cached_tokens} of them computed before)" if stats.cached_tokens else ""
    return (
        f"load {stats.load_seconds:.2f} s | "
        f"prompt {stats.prompt_tokens} tokens{cached}, {stats.prompt_speed:.1f} tokens/s | "
        f"generation {stats.generated_tokens} tokens, {stats.generation_speed:.1f} tokens/s | "
        f"peak memory {stats.peak_resident / 2**20:.0f} MiB with the mapped file, "
        f"{stats.anonymous / 2**20:.0f} MiB of its own"
    )
