"""The command `batch`: reads prompts from one file, runs many at once, writes results to another; can be resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.options import (
    Ctx,
    Device,
    DeviceOption,
    ExpertCounts,
    GpuExperts,
    GpuMemory,
    Missing,
    MissingOption,
    Precision,
    PrecisionOption,
    Threads,
    loaded,
    say,
)
from fiddler.cli.sampling_options import (
    DryAllowedLength,
    DryBase,
    DryMultiplier,
    DryPenaltyLastN,
    DrySequenceBreaker,
    FrequencyPenalty,
    LogitBias,
    MinP,
    NProbs,
    PresencePenalty,
    RepeatLastN,
    RepeatPenalty,
    Temp,
    TopK,
    TopP,
    Typical,
    XtcProbability,
    XtcThreshold,
    sampling_from,
)
from fiddler.errors import FiddlerError, ResourceError

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.completion import Generation
    from fiddler.serving.batch_input import JobFile
    from fiddler.serving.batch_results import Results
    from fiddler.serving.json_fields import Id

__all__ = ["batch"]


def batch(
    context: typer.Context,
    prompts: Annotated[
        Path, typer.Argument(metavar="IN.jsonl", help="Prompts, one JSON object a line: id, prompt, options.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="Results; ids that have one are skipped.")],
    model: Annotated[Path | None, typer.Option("-m", "--model", help="Model; the demo model if not given.")] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            "-np", "--parallel", min=1, help="Maximum batch size; if not given, it grows while throughput does."
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option("-n", "--n-predict", min=-1, help="max_tokens of lines without it; -1: until the end or --ctx."),
    ] = -1,
    temp: Temp = 0.8,
    top_k: TopK = 40,
    top_p: TopP = 0.95,
    min_p: MinP = 0.05,
    typical: Typical = 1.0,
    repeat_penalty: RepeatPenalty = 1.0,
    repeat_last_n: RepeatLastN = 64,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    dry_multiplier: DryMultiplier = 0.0,
    dry_base: DryBase = 1.75,
    dry_allowed_length: DryAllowedLength = 2,
    dry_penalty_last_n: DryPenaltyLastN = 64,
    dry_sequence_breaker: DrySequenceBreaker = None,
    xtc_probability: XtcProbability = 0.0,
    xtc_threshold: XtcThreshold = 0.1,
    logit_bias: LogitBias = None,
    n_probs: NProbs = 0,
    stop: Annotated[list[str] | None, typer.Option(help="stop of lines without it; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never sample an end token.")] = False,
    seed: Annotated[
        int, typer.Option(min=-1, help="With its id, gives the seed of each line without one; -1: random.")
    ] = -1,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemory = None,
    gpu_experts: GpuExperts = None,
    missing: MissingOption = Missing.auto,
    expert_counts: ExpertCounts = None,
    threads: Threads = None,
    ctx: Ctx = None,
    precision: PrecisionOption = Precision.fast,
) -> None:
    """Continue or answer many prompts at once, with options of their own or of the command line.

    The same command resumes an interrupted run.
    """
    from fiddler.serving.batch_input import JobFile
    from fiddler.serving.batch_results import Results
    from fiddler.serving.json_fields import Defaults

    sampling = sampling_from(context)
    if not all(stop or ()):
        raise typer.BadParameter("--stop is empty; give at least one character")
    jobs = JobFile(prompts, Defaults(sampling, None if count < 0 else count, tuple(stop or ()), ignore_eos))
    with Results(out, prompts, jobs.ids) as results:
        if len(results.done) == len(jobs.ids):
            say(f"{out} has all {len(jobs.ids)} results")
            return
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
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # after all imports: Ctrl-C may report progress
        try:
            _run(engine, jobs, results, parallel)
        except KeyboardInterrupt:
            say(f"interrupted: {len(results.done)} of {len(jobs.ids)} are in {out}; run the same command to resume")
            raise


def _run(engine: Engine, jobs: JobFile, results: Results, parallel: int | None) -> None:
    """Run all jobs that have no result yet, with a progress bar; print a summary line."""
    from tqdm import tqdm

    from fiddler.serving.batch_run import Prompts
    from fiddler.serving.json_fields import probs_of

    initial, start, failed, prompt_tokens, widest = len(results.done), time.perf_counter(), 0, 0, 0
    generated = out_of_memory = 0
    running: dict[int, Id] = {}
    prompts, pieces = Prompts(engine), engine.tokenizer.pieces(special=True)
    bar = tqdm(total=len(jobs.ids), initial=initial, unit="prompt", leave=False, disable=None, miniters=0)

    def add_error(identity: Id, error: FiddlerError) -> None:
        nonlocal failed
        results.add(identity, error=str(error))
        failed += 1

    def generations() -> Iterator[Generation]:
        """Start each job. A job that cannot run gets an error as its result and does not stop the rest."""
        index = 0
        for job in jobs.jobs(results.done):
            try:
                generation = prompts.start(job)
            except FiddlerError as error:
                add_error(job.id, error)
                bar.update(1)
                continue
            running[index] = job.id
            index += 1
            yield generation

    def on_step(tokens: int, sequences: int) -> None:
        nonlocal generated, widest
        generated, widest = tokens, max(widest, sequences)
        speed = tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{speed:.1f} tokens/s, {sequences} at once", refresh=False)
        bar.update(0)

    with bar:
        for index, outcome in engine.batch(generations(), parallel, on_step=on_step):
            identity = running.pop(index)
            if isinstance(outcome, ResourceError):  # no result: the same command retries it
                say(f"{identity}: {outcome}")
                out_of_memory += 1
            elif isinstance(outcome, FiddlerError):
                add_error(identity, outcome)
            else:
                probs = [probs_of(pieces, step) for step in outcome.log_probs]
                results.add(
                    identity,
                    text=prompts.text_of(identity, outcome.text),
                    finish_reason=outcome.finish_reason,
                    prompt_tokens=outcome.stats.prompt_tokens,
                    generated_tokens=outcome.stats.generated_tokens,
                    **({"log_probs": probs} if probs else {}),
                )
                prompt_tokens += outcome.stats.prompt_tokens
            bar.update(1)
    seconds = time.perf_counter() - start
    say(
        f"{len(results.done) - initial} results (errors: {failed}), {initial} were there | "
        f"prompts {prompt_tokens} tokens, generation {generated} tokens | "
        f"{seconds:.1f} s, {generated / max(seconds, 1e-9):.1f} generated tokens/s, up to {widest} at once"
    )
    if out_of_memory:
        raise ResourceError(
            f"{out_of_memory} prompts lacked memory and have no result; run the same command with more memory"
        )
