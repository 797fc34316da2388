"""`run --beams N`: its options, their conflicts with sampling options, and printing the beams. Knows no search."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fiddler.cli.options import say
from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.beam_hypotheses import BeamOptions, EarlyStopping
    from fiddler.generation.completion import Stats

__all__ = [
    "Beams",
    "EarlyStop",
    "EarlyStopOption",
    "LengthPenalty",
    "NBest",
    "beam_options_of",
    "check_beam_options",
    "print_beams",
]

_BEAM_PARAMETERS = ("n_best", "length_penalty", "early_stopping")


class EarlyStop(StrEnum):
    """--early-stopping, as transformers' `early_stopping`."""

    false = "false"
    true = "true"
    never = "never"


Beams = Annotated[
    int | None, typer.Option("--beams", metavar="N", min=1, help="Beam search with N beams, instead of sampling.")
]
NBest = Annotated[int, typer.Option("--n-best", metavar="K", min=1, help="With --beams: print the K best texts.")]
LengthPenalty = Annotated[
    float, typer.Option(help="With --beams: above 0 favours long texts, below 0 short ones.", show_default=True)
]
EarlyStopOption = Annotated[
    EarlyStop,
    typer.Option(
        "--early-stopping",
        help="With --beams: true ends once N texts are finished; false, once no unfinished beam scores better at its "
        "current length; never, once none can at any length.",
    ),
]


def check_beam_options(context: typer.Context, beams: int | None, n_best: int, sampling: Sequence[str]) -> None:
    """Raise BadParameter (usage error) for beam options without --beams, or sampling options with it.

    `sampling`: the names of the parameters that conflict with --beams.
    """
    wrong = [name for name in (_BEAM_PARAMETERS if beams is None else sampling) if _on_command_line(context, name)]
    if wrong:
        names = ", ".join("--" + name.replace("_", "-") for name in wrong)
        raise typer.BadParameter(f"{names}: only with --beams" if beams is None else f"{names}: not with --beams")
    if beams is not None and n_best > beams:
        raise typer.BadParameter(f"--n-best {n_best} of {beams} beams; give at most as many as --beams")


def beam_options_of(beams: int, length_penalty: float, early: EarlyStop) -> BeamOptions:
    """The options of the search. Raises BadParameter (usage error) where a value is out of range."""
    from fiddler.generation.beam_hypotheses import BeamOptions

    stopping: EarlyStopping = "never" if early is EarlyStop.never else early is EarlyStop.true
    try:
        return BeamOptions(beams, length_penalty, stopping)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None


def print_beams(
    engine: Engine,
    text: str,
    options: BeamOptions,
    max_tokens: int | None,
    n_best: int,
    *,
    stop: Sequence[str],
    ignore_eos: bool,
    prompt_cache: Path | None,
    stats: bool,
) -> Stats:
    """Search and print the best text, or the `n_best` best, each below a line with its rank and score."""
    search = engine.start_beams(text, options, max_tokens, stop=stop, ignore_eos=ignore_eos, prompt_cache=prompt_cache)
    best = search.run()[:n_best]
    for rank, beam in enumerate(best, 1):
        if n_best > 1:
            sys.stdout.write(f"== {rank}: score {beam.score:.4f}\n")
        sys.stdout.write(beam.text + "\n")
    sys.stdout.flush()
    if stats:
        scores = ", ".join(f"{beam.score:.4f} ({len(beam.tokens)} tokens, {beam.finish_reason})" for beam in best)
        say(f"scores of {len(best)} of {options.num_beams} beams: {scores}")
    return search.stats


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
