"""Sampling options of the command line, shared by the commands that generate. Knows no engine.

Names and defaults are llama.cpp's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fiddler.cli.checked_numbers import is_plain
from fiddler.cli.option_groups import OptionGroup
from fiddler.cli.text_input import read_utf8
from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.sampling.constraint import Constraint
    from fiddler.sampling.sampler import Sampling

__all__ = ["SAMPLING", "Grammar", "JsonSchema", "ProbsFile", "SamplingOptions", "constraint_of"]

_PANEL, _RARE = "Sampling", "More sampling"
_FIELDS = {"temp": "temperature", "typical": "typical_p"}  # option -> field of `Sampling`, where they differ
_BIAS = re.compile(r"\s*(\d+)\s*([+-])(.+)", re.ASCII)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def _option(*names: str, text: str, panel: str = _PANEL, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _rare(*names: str, text: str, **more: Any) -> Any:
    return _option(*names, text=text, panel=_RARE, **more)


@dataclass(frozen=True)
class SamplingOptions:
    """Values of the sampling options, as they were typed."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breaker: list[str] | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: list[str] | None = None
    seed: int = -1
    n_probs: int = 0

    def to_sampling(self) -> Sampling:
        """The `Sampling` for the options. Raises BadParameter (usage error) where a value is out of range."""
        from fiddler.sampling.sampler import Sampling

        values: dict[str, Any] = {
            _FIELDS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)
        }
        breakers = values.pop("dry_sequence_breaker")
        if breakers:
            texts = [text for text in breakers if text != "none"]
            values["dry_sequence_breakers"] = [_ESCAPE.sub(_unescaped, text) for text in texts]
        values["seed"] = None if self.seed < 0 else self.seed
        values["logit_bias"] = _biases(self.logit_bias or ())
        try:
            return Sampling(**values)
        except RequestError as error:
            raise typer.BadParameter(str(error)) from None


SAMPLING = OptionGroup(
    SamplingOptions,
    {
        "temp": _option("--temp", text="Temperature; 0 is greedy."),
        "top_k": _option("--top-k", text="Keep the k most probable tokens; 0 or less: all."),
        "top_p": _option(
            "--top-p", text="Keep the most probable tokens until they reach this total probability; 1: all."
        ),
        "min_p": _option("--min-p", text="Keep tokens this probable, relative to the most probable; 0: all."),
        "typical": _rare(
            "--typical",
            "--typical-p",
            text="Keep the most typical tokens until they exceed this total probability; 1: all.",
        ),
        "repeat_penalty": _option("--repeat-penalty", text="Penalty on recent tokens; 1: none."),
        "repeat_last_n": _rare("--repeat-last-n", min=-1, text="Number of recent tokens to penalise; -1: all."),
        "presence_penalty": _rare("--presence-penalty", text="Subtracted from the logits of recent tokens; 0: none."),
        "frequency_penalty": _rare("--frequency-penalty", text="Subtracted once per recent occurrence; 0: none."),
        "dry_multiplier": _rare(
            "--dry-multiplier", text="DRY penalty on continuing a repeated sequence of tokens; 0: none."
        ),
        "dry_base": _rare("--dry-base", text="Growth of the DRY penalty per repeated token."),
        "dry_allowed_length": _rare("--dry-allowed-length", text="Shorter repetitions have no DRY penalty."),
        "dry_penalty_last_n": _rare("--dry-penalty-last-n", text="Number of recent tokens that DRY searches; -1: all."),
        "dry_sequence_breaker": _rare(
            "--dry-sequence-breaker",
            text="DRY's repeated sequences end at this text (with escapes as \\n); may be repeated, instead of "
            "newline, colon, quote and asterisk; 'none': no breakers.",
        ),
        "xtc_probability": _rare(
            "--xtc-probability", text="Probability that XTC drops the most probable tokens; 0: never."
        ),
        "xtc_threshold": _rare(
            "--xtc-threshold", text="XTC drops tokens at least this probable, except the least of them."
        ),
        "logit_bias": _rare(
            "-l",
            "--logit-bias",
            metavar="ID(+/-)BIAS",
            text="Add to a token's logit, as 15043+1 or 15043-inf; may be repeated.",
        ),
        "seed": _option("--seed", min=-1, text="Random seed; -1: a new one each time."),
        "n_probs": _rare(
            "--n-probs",
            min=0,
            text="After the text, print one line of JSON per token to stderr: its log-probability and those of the N "
            "most probable tokens, in the model's own distribution.",
        ),
    },
)
"""Options of sampling."""

ProbsFile = Annotated[
    Path | None, _rare("--probs-file", text="Write the lines of --n-probs to this file.", readable=False)
]
JsonSchema = Annotated[
    str | None,
    _option("--json-schema", "--json-schema-file", metavar="FILE", text="Constrain the text to JSON of this schema."),
]
Grammar = Annotated[
    str | None,
    _option("--grammar", "--grammar-file", metavar="FILE", text="Constrain the text to this grammar, GBNF or Lark."),
]


def constraint_of(json_schema: str | None, grammar: str | None) -> Constraint | None:
    """The constraint of --json-schema or --grammar: each names a file or, as in llama.cpp, is the text itself.

    Raises BadParameter (usage error) where both are given, FiddlerError where the file cannot be read or used.
    """
    if json_schema is not None and grammar is not None:
        raise typer.BadParameter("give --json-schema or --grammar, not both")
    from fiddler.sampling.constraint import Constraint

    if json_schema is not None:
        inline = json_schema.lstrip().startswith("{")
        return Constraint.json_schema(json_schema if inline else read_utf8(Path(json_schema), "a JSON schema"))
    if grammar is not None:
        return Constraint.grammar(grammar if "::=" in grammar else read_utf8(Path(grammar), "a grammar, GBNF or Lark"))
    return None


def _biases(options: Sequence[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in options:
        parts = _BIAS.fullmatch(text) if is_plain(text) else None
        try:
            token, bias = int(parts[1]), float(parts[2] + parts[3])  # type: ignore[index]
        except (TypeError, ValueError):
            raise typer.BadParameter(f"--logit-bias {text}: give a token id and a bias, as 15043+1") from None
        biases[token] = biases.get(token, 0.0) + bias
    return biases


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)) if match[1] else _ESCAPED.get(match[2], match[2])
