"""The command `perplexity`: reads text and model, shows the running estimate, prints the result. Scores nothing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, ModelOrDemo, loaded, say
from fiddler.errors import FiddlerError, RequestError
from fiddler.load_options import DEFAULT_CONTEXT, LoadOptions

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.evaluation.perplexity import Estimate
    from fiddler.models.config import Config

__all__ = ["perplexity"]


@with_options(LOADING.without("context", "expert_counts"))
def perplexity(
    file: Annotated[Path, typer.Option("-f", "--file", help="Text file to score.")],
    model: ModelOrDemo = None,
    ctx: Annotated[int, typer.Option("-c", "--ctx", min=3, help="Window length in tokens.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    counts: Annotated[
        Path | None,
        typer.Option("--expert-counts", metavar="FILE", help="Write expert frequencies, for `run`."),
    ] = None,
    *,
    loading: LoadOptions,
) -> None:
    """Measure a model's perplexity on a text as llama-perplexity does: the second half of each window of -c tokens."""
    text = _text(file)
    from fiddler.files.model_file import ModelFile

    if model is None:
        from fiddler.loading import DEMO_MODEL

        model = DEMO_MODEL
    model_file = ModelFile.open(model)
    if ctx > model_file.config.context_length:
        raise RequestError(f"--ctx {ctx}: the model was trained with {model_file.config.context_length} positions")
    if counts is not None:
        _check_counts(counts, model_file.config)
    model_file.check_runnable()
    tokenizer = model_file.tokenizer
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
    from fiddler.evaluation.perplexity import cut

    try:
        windows = cut(ids, ctx)
    except RequestError as error:
        raise RequestError(f"{file}: {error}") from None
    # with a small --ctx the context stays larger: the longest steps hold several windows
    engine = loaded(model_file, replace(loading, context=ctx if ctx > DEFAULT_CONTEXT else None))
    started = time.perf_counter()
    estimate, frequencies = _measure(engine, windows, counted=counts is not None)
    seconds = time.perf_counter() - started
    speed = len(windows) * ctx / seconds
    if as_json:
        result = {
            "perplexity": estimate.perplexity,
            "standard_error": estimate.standard_error,
            "tokens_scored": estimate.tokens,
            "windows": estimate.windows,
            "context": ctx,
            "seconds": seconds,
            "tokens_per_second": speed,
            "model": str(model),
            "file": str(file),
            "device": engine.device,
            "precision": loading.precision,
            "backend": engine.backend,
            "threads": engine.runner.threads,
        }
        print(json.dumps(result, indent=2))
    else:
        print(f"Final estimate: PPL = {estimate.perplexity:.4f} +/- {estimate.standard_error:.5f}")
    say(
        f"{engine.where} | {estimate.tokens} tokens scored in {estimate.windows} windows of {ctx} | "
        f"{seconds:.1f} s, {speed:.1f} tokens/s"
    )
    if counts is not None:
        _write_counts(counts, frequencies)


def _text(file: Path) -> bytes:
    """The text to score, as llama.cpp reads it; it need not be UTF-8. Raises FiddlerError where it cannot be read."""
    try:
        return file.read_bytes().removesuffix(b"\n")
    except OSError as error:
        raise FiddlerError(f"{file}: cannot be read: {error.strerror}") from None


def _measure(engine: Engine, windows: Sequence[Sequence[int]], *, counted: bool) -> tuple[Estimate, list[list[int]]]:
    """Score the windows, with a progress bar; the estimate, and how often each expert was chosen, [L][E]."""
    from tqdm import tqdm

    from fiddler.evaluation.perplexity import measure
    from fiddler.telemetry.expert_counts import counting

    tokenizer, window = engine.tokenizer, len(windows[0])
    with (
        counting(engine.runner.model) if counted else nullcontext() as counter,
        tqdm(total=len(windows) * window, unit="token", unit_scale=True, leave=False, disable=None) as bar,
    ):
        for estimate in measure(engine.runner, windows, tokenizer.bos_id if tokenizer.add_bos else None):
            bar.set_postfix_str(f"PPL {estimate.perplexity:.4f} +/- {estimate.standard_error:.4f}", refresh=False)
            bar.update(window)
    return estimate, [] if counter is None else counter.counts


def _check_counts(target: Path, config: Config) -> None:
    """Raises RequestError where `target` cannot be written, or is a file of anything but this model's expert counts."""
    from fiddler.files.atomic_file import check_target
    from fiddler.telemetry.expert_counts import read_counts

    check_target(target, force=True)
    if not os.access(target.parent, os.W_OK):
        raise RequestError(f"{target.parent} cannot be written in; name a file elsewhere")
    if target.exists():
        try:
            read_counts(target, config.block_count, config.expert_count)
        except RequestError:
            raise RequestError(
                f"{target} exists and is no file of this model's expert counts; remove it or name another"
            ) from None


def _write_counts(target: Path, counts: list[list[int]]) -> None:
    from fiddler.files.atomic_file import whole_file

    with whole_file(target, force=True) as temporary:
        temporary.write_text(json.dumps({"counts": counts}) + "\n")
