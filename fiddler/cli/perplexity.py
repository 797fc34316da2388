"""The command `perplexity`: reads text and model, shows the running estimate, prints the result. Scores nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, ModelOrDemo, loaded, open_output, opened, say
from fiddler.cli.text_input import read_scored
from fiddler.errors import RequestError
from fiddler.load_options import DEFAULT_CONTEXT, LoadOptions

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.evaluation.perplexity import Estimate
    from fiddler.files.model_file import ModelFile
    from fiddler.models.config import Config

__all__ = ["perplexity"]


@with_options(LOADING.without("context", "expert_counts"))
def perplexity(
    file: Annotated[Path, typer.Option("-f", "--file", readable=False, help="Text file to score.")],
    model: ModelOrDemo = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=3, help="Window length in tokens.")] = 512,
    chunks: Annotated[int | None, typer.Option(min=1, help="Number of windows to score; all if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    counts: Annotated[
        Path | None,
        typer.Option("--expert-counts", metavar="FILE", readable=False, help="Write expert frequencies, for `run`."),
    ] = None,
    *,
    loading: LoadOptions,
) -> None:
    """Measure a model's perplexity on a text as llama-perplexity does: the second half of each window of -c tokens."""
    text = read_scored(file)
    model_file = _open(model, ctx, counts)
    tokenizer = model_file.tokenizer
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
    from fiddler.evaluation.perplexity import cut
    from fiddler.telemetry.expert_counts import ExpertCounts
    from fiddler.telemetry.recorder import SILENT

    try:
        windows = cut(ids, ctx)[:chunks]
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None
    config = model_file.config
    counter = None if counts is None else ExpertCounts(len(config.sparse_layers), config.expert_count)
    # with a small --ctx the context stays larger: the longest steps hold several windows
    options = replace(loading, context=ctx if ctx > DEFAULT_CONTEXT else None)
    with open_output(counts) as counts_file:
        engine = loaded(model_file, options, recorder=SILENT if counter is None else counter)
        started = time.perf_counter()
        estimate = _measure(engine, windows)
        seconds = time.perf_counter() - started
        if as_json:
            result = {
                **_result(estimate, ctx, seconds),
                "model": str(model_file.file.path),
                "file": str(file),
                "device": engine.device,
                "precision": loading.precision,
                "backend": engine.backend,
                "threads": engine.runner.threads,
            }
            print(json.dumps(result, indent=2))
        else:
            print(f"Final estimate: PPL = {estimate.perplexity:.4f} +/- {estimate.standard_error:.5f}")
        sys.stdout.flush()  # before the counts, which may go there, too
        say(
            f"{engine.where} | {estimate.tokens} tokens scored in {estimate.windows} windows of {ctx} | "
            f"{seconds:.1f} s, {len(windows) * ctx / seconds:.1f} tokens/s"
        )
        if counts_file is not None and counter is not None:
            counts_file.write((json.dumps({"counts": counter.counts}) + "\n").encode())


def _result(estimate: Estimate, window: int, seconds: float) -> dict[str, object]:
    """The estimate as JSON's fields."""
    return {
        "perplexity": estimate.perplexity,
        "standard_error": estimate.standard_error,
        "tokens_scored": estimate.tokens,
        "windows": estimate.windows,
        "context": window,
        "seconds": seconds,
        "tokens_per_second": estimate.windows * window / seconds,
    }


def _open(model: Path | None, ctx: int, counts: Path | None) -> ModelFile:
    """The opened model. Raises FiddlerError where it cannot run, --ctx is too long or `counts` cannot be written."""
    model_file = opened(model)
    if ctx > model_file.config.context_length:
        raise RequestError(f"--ctx {ctx}: the model was trained with {model_file.config.context_length} positions")
    if counts is not None and not model_file.config.architecture.has_experts:
        raise RequestError(f"--expert-counts {counts}: {model_file.file.shown_path} has no experts; leave it out")
    if counts is not None:
        _check_counts(counts, model_file.config)
    model_file.check_runnable()
    return model_file


def _measure(engine: Engine, windows: Sequence[Sequence[int]]) -> Estimate:
    """Score the windows, with a progress bar."""
    from tqdm import tqdm

    from fiddler.evaluation.perplexity import measure

    tokenizer, window = engine.tokenizer, len(windows[0])
    with tqdm(total=len(windows) * window, unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for estimate in measure(engine.runner, windows, tokenizer.bos_id if tokenizer.add_bos else None):
            bar.set_postfix_str(f"PPL {estimate.perplexity:.4f} +/- {estimate.standard_error:.4f}", refresh=False)
            bar.update(window)
    return estimate


def _check_counts(target: Path, config: Config) -> None:
    """Raises RequestError where `target` cannot be written, or is a file of anything but this model's expert counts."""
    from fiddler.files.atomic_file import check_target
    from fiddler.telemetry.expert_counts import read_counts

    to = check_target(target, force=True)
    if to.mode is not None and not to.is_stream:
        try:
            read_counts(target, len(config.sparse_layers), config.expert_count)
        except RequestError:
            raise RequestError(
                f"{target} exists and is no file of this model's expert counts; remove it or name another"
            ) from None
