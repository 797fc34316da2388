"""The command `batch`: reads prompts from one file, runs many at once, writes results to another; can be resumed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Never

import typer

from fiddler.cli.chat import MERGED
from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, loaded, say
from fiddler.cli.sampling_options import SAMPLING, SamplingOptions
from fiddler.errors import FiddlerError, RequestError, ResourceError
from fiddler.load_options import LoadOptions

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.drivers import Outcome
    from fiddler.generation.sampled_text import Generation
    from fiddler.serving.batch_input import JobFile
    from fiddler.serving.batch_results import Results
    from fiddler.serving.json_fields import Id

__all__ = ["batch"]

_SAMPLING = SAMPLING.with_help(seed="With its id, gives the seed of each line without one; -1: random.")


@with_options(LOADING, _SAMPLING)
def batch(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="IN.jsonl", readable=False, help="Prompts, one JSON object a line: id, prompt, options."
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT.jsonl", readable=False, help="Results; ids that have one are skipped.")
    ],
    model: Annotated[
        Path | None, typer.Option("-m", "--model", readable=False, help="Model; the demo model if not given.")
    ] = None,
    parallel: Annotated[
        int | None,
        typer.Option(
            "-np", "--parallel", min=1, help="Prompts at once; if not given, as many as this machine has a use for."
        ),
    ] = None,
    count: Annotated[
        int,
        typer.Option("-n", "--n-predict", min=-1, help="max_tokens of lines without it; -1: until the end or --ctx."),
    ] = -1,
    *,
    sampling: SamplingOptions,
    stop: Annotated[list[str] | None, typer.Option(help="stop of lines without it; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never sample an end token.")] = False,
    loading: LoadOptions,
) -> None:
    """Continue or answer many prompts at once, with options of their own or of the command line.

    The same command resumes an interrupted run.
    """
    from fiddler.generation.request import Request
    from fiddler.serving.batch_input import JobFile
    from fiddler.serving.batch_results import Results

    values = sampling.to_sampling()
    if not all(stop or ()):
        raise typer.BadParameter("--stop is empty; give at least one character")
    defaults = Request("", values, None if count < 0 else count, tuple(stop or ()), ignore_eos)
    jobs = JobFile(prompts, defaults)
    with Results(out, prompts, jobs.ids) as results:
        if len(results.done) == len(jobs.ids):
            say(f"{out} has all {len(jobs.ids)} results")
            return
        engine = loaded(model, loading)
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # after all imports: Ctrl-C may report progress
        try:
            _Run(engine, jobs, results).run(parallel)
        except KeyboardInterrupt:
            say(f"interrupted: {len(results.done)} of {len(jobs.ids)} are in {out}; run the same command to resume")
            raise


class _Run:
    """All jobs that have no result yet, run at once: their results, a progress bar, and a summary line."""

    def __init__(self, engine: Engine, jobs: JobFile, results: Results) -> None:
        from tqdm import tqdm

        from fiddler.serving.batch_run import Prompts

        self._engine, self._jobs, self._results = engine, jobs, results
        self._prompts, self._pieces = Prompts(engine), engine.tokenizer.pieces(special=True)
        self._running: dict[int, Id] = {}
        self._initial, self._started = len(results.done), time.perf_counter()
        self._failed = self._out_of_memory = self._prompt_tokens = self._generated_tokens = self._widest = 0
        self._bar: tqdm[Never] = tqdm(
            total=len(jobs.ids), initial=self._initial, unit="prompt", leave=False, disable=None, miniters=0
        )

    def run(self, parallel: int | None) -> None:
        """Raises ResourceError, at the end, where jobs lacked memory: they have no result."""
        with self._bar:
            for index, outcome in self._engine.batch(self._generations(), parallel=parallel, on_step=self._on_step):
                self._add(self._running.pop(index), outcome)
                self._bar.update(1)
        if self._prompts.merges_system:
            say(MERGED)
        say(self._summary())
        if self._out_of_memory:
            raise ResourceError(
                f"{self._out_of_memory} prompts lacked memory and have no result; run the same command with more memory"
            )

    def _generations(self) -> Iterator[Generation]:
        """Start each job. A line that cannot run gets an error as its result and does not stop the rest."""
        index = 0
        for identity, job in self._jobs.jobs(self._results.done):
            try:
                if isinstance(job, RequestError):
                    raise job
                generation = self._prompts.start(job)
            except FiddlerError as error:
                self._add_error(identity, error)
                self._bar.update(1)
                continue
            self._running[index] = identity
            index += 1
            yield generation

    def _on_step(self, tokens: int, sequences: int) -> None:
        self._generated_tokens, self._widest = tokens, max(self._widest, sequences)
        speed = tokens / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:.1f} tokens/s, {sequences} at once", refresh=False)
        self._bar.update(0)

    def _add(self, identity: Id, outcome: Outcome) -> None:
        from fiddler.generation.completion import Completion
        from fiddler.serving.json_fields import probs_of

        if isinstance(outcome, ResourceError):  # no result: the same command retries it
            say(f"{identity}: {outcome}")
            self._out_of_memory += 1
        elif isinstance(outcome, FiddlerError):
            self._add_error(identity, outcome)
        else:
            assert isinstance(outcome, Completion)
            probs = [probs_of(self._pieces, step) for step in outcome.log_probs]
            self._results.add(
                identity,
                text=self._prompts.text_of(identity, outcome.text),
                finish_reason=outcome.finish_reason,
                prompt_tokens=outcome.stats.prompt_tokens,
                generated_tokens=outcome.stats.generated_tokens,
                **({"log_probs": probs} if probs else {}),
            )
            self._prompt_tokens += outcome.stats.prompt_tokens

    def _add_error(self, identity: Id, error: FiddlerError) -> None:
        self._results.add(identity, error=str(error))
        self._failed += 1

    def _summary(self) -> str:
        seconds = time.perf_counter() - self._started
        return (
            f"{len(self._results.done) - self._initial} results (errors: {self._failed}), {self._initial} were there | "
            f"prompts {self._prompt_tokens} tokens, generation {self._generated_tokens} tokens | {seconds:.1f} s, "
            f"{self._generated_tokens / max(seconds, 1e-9):.1f} generated tokens/s, up to {self._widest} at once"
        )
