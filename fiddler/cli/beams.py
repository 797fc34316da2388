"""`run --beams N`: its options, their conflicts with sampling options, and printing the beams. Knows no search."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from fiddler.cli.option_groups import OptionGroup
from fiddler.cli.options import say
from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.beam_hypotheses import BeamOptions, EarlyStopping
    from fiddler.generation.completion import Stats
    from fiddler.generation.request import Request

__all__ = ["BEAMS", "BeamSearchOptions", "print_beams"]

_PANEL = "Beam search"
_ONLY_WITH_BEAMS = ("n_best", "length_penalty", "early_stopping")


@dataclass(frozen=True)
class BeamSearchOptions:
    """Values of the options of `run --beams N`; `beams` None: no beam search."""

    beams: int | None = None
    n_best: int = 1
    length_penalty: float = 1.0
    early_stopping: Literal["false", "true", "never"] = "false"  # as transformers' `early_stopping`

    def check(self, command: typer.Context, sampling: Collection[str]) -> None:
        """Raise BadParameter (usage error) for options without --beams, or for sampling options with it.

        `sampling`: the names of the parameters that conflict with --beams.
        """
        conflicting = _ONLY_WITH_BEAMS if self.beams is None else sampling
        wrong = [name for name in conflicting if _on_command_line(command, name)]
        if wrong:
            names = ", ".join("--" + name.replace("_", "-") for name in wrong)
            raise typer.BadParameter(f"{names}: {'only' if self.beams is None else 'not'} with --beams")
        if self.beams is not None and self.n_best > self.beams:
            raise typer.BadParameter(f"--n-best {self.n_best} of {self.beams} beams; give at most as many as --beams")

    def to_search(self) -> BeamOptions | None:
        """The options of the search, if any. Raises BadParameter (usage error) where a value is out of range."""
        if self.beams is None:
            return None
        from fiddler.generation.beam_hypotheses import BeamOptions

        stopping: EarlyStopping = "never" if self.early_stopping == "never" else self.early_stopping == "true"
        try:
            return BeamOptions(self.beams, self.length_penalty, stopping)
        except RequestError as error:
            raise typer.BadParameter(str(error)) from None


def _option(*names: str, **more: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_PANEL, **more)


BEAMS = OptionGroup(
    BeamSearchOptions,
    {
        "beams": _option("--beams", metavar="N", min=1, help="Beam search with N beams, instead of sampling."),
        "n_best": _option("--n-best", metavar="K", min=1, help="With --beams: print the K best texts."),
        "length_penalty": _option(
            help="With --beams: above 0 favours long texts, below 0 short ones.", show_default=True
        ),
        "early_stopping": _option(
            help="With --beams: true ends once N texts are finished; false, once no unfinished beam scores better at "
            "its current length; never, once none can at any length.",
        ),
    },
)
"""Options of beam search."""


def print_beams(
    engine: Engine,
    request: Request,
    options: BeamOptions,
    n_best: int,
    prompt_cache: Path | None,
    *,
    answer: bool,
    stats: bool,
) -> Stats:
    """Search and print the best text, or the `n_best` best, each below a line with its rank and score.

    answer: to a message; its first space belongs to the tokenizer.
    """
    search = engine.start_beams(request, options, prompt_cache=prompt_cache)
    best, prefixed = search.run()[:n_best], answer and engine.tokenizer.add_space_prefix
    for rank, beam in enumerate(best, 1):
        if n_best > 1:
            sys.stdout.write(f"== {rank}: score {beam.score:.4f}\n")
        sys.stdout.write((beam.text.removeprefix(" ") if prefixed else beam.text) + "\n")
    sys.stdout.flush()
    if stats:
        scores = ", ".join(f"{beam.score:.4f} ({len(beam.tokens)} tokens, {beam.finish_reason})" for beam in best)
        say(f"scores of {len(best)} of {options.num_beams} beams: {scores}")
    return search.stats


def _on_command_line(command: typer.Context, name: str) -> bool:
    source = command.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
