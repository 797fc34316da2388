"""How tokens are chosen, as options of the command line: shared by the commands that generate.

Names and defaults are llama.cpp's. Each option is an annotated type; `sampling_of` and `constraint_of` make of their
values what the engine takes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fiddler.errors import FiddlerError, RequestError

if TYPE_CHECKING:
    from fiddler.sampling.constraint import Constraint
    from fiddler.sampling.sampler import Sampling

__all__ = [
    "SAMPLING",
    "DryAllowedLength",
    "DryBase",
    "DryMultiplier",
    "DryPenaltyLastN",
    "DrySequenceBreaker",
    "FrequencyPenalty",
    "Grammar",
    "JsonSchema",
    "LogitBias",
    "MinP",
    "NProbs",
    "PresencePenalty",
    "ProbsFile",
    "RepeatLastN",
    "RepeatPenalty",
    "Seed",
    "Temp",
    "TopK",
    "TopP",
    "Typical",
    "XtcProbability",
    "XtcThreshold",
    "constraint_of",
    "sampling_from",
    "sampling_of",
]

_PANEL = "How tokens are chosen"
_BIAS = re.compile(r"\s*(\d+)\s*([+-])(.+)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def _option(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PANEL, **more)


Temp = Annotated[float, _option("--temp", text="Temperature; 0 is greedy.")]
TopK = Annotated[int, _option("--top-k", text="Keep the k most probable tokens; 0 or less: all.")]
TopP = Annotated[float, _option("--top-p", text="Keep the fewest tokens that reach this probability; 1: all.")]
MinP = Annotated[float, _option("--min-p", text="Keep tokens this probable, relative to the first; 0: all.")]
Typical = Annotated[
    float,
    _option("--typical", "--typical-p", text="Keep the most typical tokens that exceed this probability; 1: all."),
]
RepeatPenalty = Annotated[float, _option("--repeat-penalty", text="Penalty on tokens seen lately; 1: none.")]
RepeatLastN = Annotated[int, _option("--repeat-last-n", min=-1, text="How many tokens are lately; -1: all.")]
PresencePenalty = Annotated[
    float, _option("--presence-penalty", text="Subtracted from logits of tokens seen lately; 0: none.")
]
FrequencyPenalty = Annotated[float, _option("--frequency-penalty", text="The same, as often as seen; 0: none.")]
DryMultiplier = Annotated[
    float, _option("--dry-multiplier", text="DRY's penalty on going on with a repeated run of tokens; 0: none.")
]
DryBase = Annotated[float, _option("--dry-base", text="It grows by this factor with every token of the run.")]
DryAllowedLength = Annotated[int, _option("--dry-allowed-length", text="Shorter runs are free.")]
DryPenaltyLastN = Annotated[
    int, _option("--dry-penalty-last-n", text="How many tokens are searched for runs; -1: all.")
]
DrySequenceBreaker = Annotated[
    list[str] | None,
    _option(
        "--dry-sequence-breaker",
        text="No run goes over this text (\\n and the like are understood); may be repeated, instead of "
        "newline, colon, quote and asterisk; 'none': nothing breaks runs.",
    ),
]
XtcProbability = Annotated[
    float, _option("--xtc-probability", text="How often XTC drops the most probable tokens; 0: never.")
]
XtcThreshold = Annotated[
    float, _option("--xtc-threshold", text="It drops tokens this probable, all but the last of them.")
]
LogitBias = Annotated[
    list[str] | None,
    _option(
        "-l",
        "--logit-bias",
        metavar="ID(+/-)BIAS",
        text="Add to a token's logit, as 15043+1 or 15043-inf; may be repeated.",
    ),
]
Seed = Annotated[int, _option("--seed", min=-1, text="Seed of the sampling; -1: a new one each time.")]
NProbs = Annotated[
    int,
    _option(
        "--n-probs",
        min=0,
        text="After the text, print a line of JSON a token to stderr: its log-probability and those of the N most "
        "probable tokens, of the model's own distribution.",
    ),
]
ProbsFile = Annotated[Path | None, _option("--probs-file", text="Write these lines to a file.")]
JsonSchema = Annotated[
    str | None,
    _option("--json-schema", "--json-schema-file", metavar="FILE", text="Answer in JSON valid by this schema."),
]
Grammar = Annotated[
    str | None,
    _option(
        "--grammar", "--grammar-file", metavar="FILE", text="Answer in the language of this grammar, GBNF or Lark."
    ),
]


SAMPLING = {
    "temp": "temperature",
    "typical": "typical_p",
    **{
        name: name
        for name in (
            *("top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"),
            *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breaker"),
            *("xtc_probability", "xtc_threshold", "logit_bias", "seed", "n_probs"),
        )
    },
}
"""Parameters of a command, and what `sampling_of` calls them."""


def sampling_from(given: typer.Context) -> Sampling:
    """The `Sampling` that a command's options ask for. Errors: see `sampling_of`."""
    return sampling_of(**{name: given.params[parameter] for parameter, name in SAMPLING.items()})


def sampling_of(
    *, seed: int, logit_bias: Sequence[str] | None, dry_sequence_breaker: Sequence[str] | None, **values: float
) -> Sampling:
    """The `Sampling` that options ask for; `values` by its own names. Raises BadParameter, wrong usage, where they make
    no sense.
    """
    from fiddler.sampling.sampler import Sampling

    fields: dict[str, Any] = dict(values)
    if dry_sequence_breaker:
        given = [text for text in dry_sequence_breaker if text != "none"]
        fields["dry_sequence_breakers"] = [_ESCAPE.sub(_unescaped, text) for text in given]
    try:
        return Sampling(seed=None if seed < 0 else seed, logit_bias=_biases(logit_bias or ()), **fields)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None


def constraint_of(json_schema: str | None, grammar: str | None) -> Constraint | None:
    """What --json-schema or --grammar asks for: a file's name, or, as llama.cpp's options take it, the text itself.

    Raises BadParameter where both are given, FiddlerError where the file cannot be read or used.
    """
    if json_schema is not None and grammar is not None:
        raise typer.BadParameter("give --json-schema or --grammar, not both")
    from fiddler.sampling.constraint import Constraint

    if json_schema is not None:
        inline = json_schema.lstrip().startswith("{")
        return Constraint.json_schema(json_schema if inline else _read(json_schema))
    if grammar is not None:
        return Constraint.grammar(grammar if "::=" in grammar else _read(grammar))
    return None


def _biases(given: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in given:
        parts = _BIAS.fullmatch(text)
        try:
            token, bias = int(parts[1]), float(parts[2] + parts[3])  # type: ignore[index]
        except (TypeError, ValueError):
            raise typer.BadParameter(f"--logit-bias {text}: give a token's id and what to add, as 15043+1") from None
        biases[token] = biases.get(token, 0.0) + bias
    return biases


def _unescaped(found: re.Match[str]) -> str:
    return chr(int(found[1], 16)) if found[1] else _ESCAPED.get(found[2], found[2])


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise FiddlerError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FiddlerError(f"{name}: is no text in UTF-8") from None
