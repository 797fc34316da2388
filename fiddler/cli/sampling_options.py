"""Sampling options of the command line, shared by the commands that generate. Knows no engine.

Names and defaults are llama.cpp's. Each option is an annotated type; `sampling_of` and `constraint_of` turn the values
into the engine's arguments.
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

_PANEL = "Sampling"
_BIAS = re.compile(r"\s*(\d+)\s*([+-])(.+)")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def _option(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_PANEL, **more)


Temp = Annotated[float, _option("--temp", text="Temperature; 0 is greedy.")]
TopK = Annotated[int, _option("--top-k", text="Keep the k most probable tokens; 0 or less: all.")]
TopP = Annotated[
    float, _option("--top-p", text="Keep the most probable tokens until they reach this total probability; 1: all.")
]
MinP = Annotated[float, _option("--min-p", text="Keep tokens this probable, relative to the most probable; 0: all.")]
Typical = Annotated[
    float,
    _option(
        "--typical",
        "--typical-p",
        text="Keep the most typical tokens until they exceed this total probability; 1: all.",
    ),
]
RepeatPenalty = Annotated[float, _option("--repeat-penalty", text="Penalty on recent tokens; 1: none.")]
RepeatLastN = Annotated[int, _option("--repeat-last-n", min=-1, text="Number of recent tokens to penalise; -1: all.")]
PresencePenalty = Annotated[
    float, _option("--presence-penalty", text="Subtracted from the logits of recent tokens; 0: none.")
]
FrequencyPenalty = Annotated[
    float, _option("--frequency-penalty", text="Subtracted once per recent occurrence; 0: none.")
]
DryMultiplier = Annotated[
    float, _option("--dry-multiplier", text="DRY penalty on continuing a repeated sequence of tokens; 0: none.")
]
DryBase = Annotated[float, _option("--dry-base", text="Growth of the DRY penalty per repeated token.")]
DryAllowedLength = Annotated[int, _option("--dry-allowed-length", text="Shorter repetitions have no DRY penalty.")]
DryPenaltyLastN = Annotated[
    int, _option("--dry-penalty-last-n", text="Number of recent tokens that DRY searches; -1: all.")
]
DrySequenceBreaker = Annotated[
    list[str] | None,
    _option(
        "--dry-sequence-breaker",
        text="DRY's repeated sequences end at this text (with escapes as \\n); may be repeated, instead of "
        "newline, colon, quote and asterisk; 'none': no breakers.",
    ),
]
XtcProbability = Annotated[
    float, _option("--xtc-probability", text="Probability that XTC drops the most probable tokens; 0: never.")
]
XtcThreshold = Annotated[
    float, _option("--xtc-threshold", text="XTC drops tokens at least this probable, except the least of them.")
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
Seed = Annotated[int, _option("--seed", min=-1, text="Random seed; -1: a new one each time.")]
NProbs = Annotated[
    int,
    _option(
        "--n-probs",
        min=0,
        text="After the text, print one line of JSON per token to stderr: its log-probability and those of the N most "
        "probable tokens, in the model's own distribution.",
    ),
]
ProbsFile = Annotated[Path | None, _option("--probs-file", text="Write the lines of --n-probs to this file.")]
JsonSchema = Annotated[
    str | None,
    _option("--json-schema", "--json-schema-file", metavar="FILE", text="Constrain the text to JSON of this schema."),
]
Grammar = Annotated[
    str | None,
    _option("--grammar", "--grammar-file", metavar="FILE", text="Constrain the text to this grammar, GBNF or Lark."),
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
"""Parameter of a command -> argument of `sampling_of`."""


def sampling_from(context: typer.Context) -> Sampling:
    """The `Sampling` for a command's options. Raises as `sampling_of` does."""
    return sampling_of(**{name: context.params[parameter] for parameter, name in SAMPLING.items()})


def sampling_of(
    *, seed: int, logit_bias: Sequence[str] | None, dry_sequence_breaker: Sequence[str] | None, **values: float
) -> Sampling:
    """The `Sampling` for the options; `values` are its fields by name.

    Raises BadParameter (usage error) where a value is out of range.
    """
    from fiddler.sampling.sampler import Sampling

    fields: dict[str, Any] = dict(values)
    if dry_sequence_breaker:
        breakers = [text for text in dry_sequence_breaker if text != "none"]
        fields["dry_sequence_breakers"] = [_ESCAPE.sub(_unescaped, text) for text in breakers]
    try:
        return Sampling(seed=None if seed < 0 else seed, logit_bias=_biases(logit_bias or ()), **fields)
    except RequestError as error:
        raise typer.BadParameter(str(error)) from None


def constraint_of(json_schema: str | None, grammar: str | None) -> Constraint | None:
    """The constraint of --json-schema or --grammar: each names a file or, as in llama.cpp, is the text itself.

    Raises BadParameter (usage error) where both are given, FiddlerError where the file cannot be read or used.
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


def _biases(options: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in options:
        parts = _BIAS.fullmatch(text)
        try:
            token, bias = int(parts[1]), float(parts[2] + parts[3])  # type: ignore[index]
        except (TypeError, ValueError):
            raise typer.BadParameter(f"--logit-bias {text}: give a token id and a bias, as 15043+1") from None
        biases[token] = biases.get(token, 0.0) + bias
    return biases


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else _ESCAPED.get(match[2], match[2])


def _read(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise FiddlerError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FiddlerError(f"{name}: is no text in UTF-8") from None
