"""White space in a `tokenizer.json`: how its normaliser and pre-tokenizer put "▁" for spaces and before a text.

Four forms of Llama tokenizers are in use: a normaliser that prepends "▁" and replaces spaces by it; the `Metaspace`
pre-tokenizer; and the two that transformers 5 saves for a `tokenizer.model`, with `legacy` and without. The
`tokenizers` library is their only specification (https://github.com/huggingface/tokenizers). Does not know tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from fiddler.converters.tokenizer.pieces import SPACE
from fiddler.converters.tokenizer.steps import steps_of
from fiddler.errors import CheckpointError, quoted

__all__ = ["WhiteSpace", "white_space"]

_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# transformers 5 for `legacy`: `Metaspace` prepends nothing to a text that begins with a space, SentencePiece does.
_DOUBLE = {"type": "Replace", "pattern": {"Regex": rf"\A{SPACE}"}, "content": SPACE * 2}
_UNESCAPED = re.compile(r"\\(.)", re.DOTALL)


@dataclass(frozen=True)
class WhiteSpace:
    """`add_space_prefix` and `prepend_scheme` are those of `Pieces`; `splits`: tokens begin at each space.

    `normalizes`: the text is changed before added tokens with `normalized` are looked for. `in_text`: names of
    user-defined tokens that are isolated within a text.
    """

    add_space_prefix: bool
    prepend_scheme: str | None
    splits: bool
    normalizes: bool
    in_text: tuple[str, ...] = ()


def white_space(normalizer: object, pre_tokenizer: object, refused: Callable[[str], CheckpointError]) -> WhiteSpace:
    """The rule of a `normalizer` and a `pre_tokenizer`; raises `refused(reason)` for any other."""
    normalizers, splitters = steps_of(normalizer, "normalizers"), steps_of(pre_tokenizer, "pretokenizers")
    in_text: tuple[str, ...] = ()
    if splitters and (names := _isolated(splitters[-1])):
        in_text, splitters = names, splitters[:-1]
    if not splitters:
        if normalizers in ([_PREPEND, _REPLACE], [_REPLACE, _PREPEND]):
            return WhiteSpace(True, None, False, True, in_text)
        if normalizers == [_REPLACE]:
            return WhiteSpace(False, None, False, True, in_text)
    if normalizers not in ([], [_REPLACE], [_REPLACE, _DOUBLE]) or (normalizers and not splitters):
        raise refused(f"its normalizer is {_types(normalizers)}, its pre-tokenizer {_types(splitters)}")
    if len(splitters) != 1 or splitters[0].get("type") != "Metaspace":
        raise refused(f"its pre-tokenizer is {_types(splitters)}")
    scheme, splits = _metaspace(splitters[0], refused)
    if _DOUBLE in normalizers:
        if scheme != "always":
            raise refused(f"its normalizer doubles the first space, and its Metaspace prepend_scheme is '{scheme}'")
        return WhiteSpace(True, None, splits, True, in_text)
    rule = None if scheme == "never" else scheme
    return WhiteSpace(rule is not None, rule, splits, bool(normalizers), in_text)


def _metaspace(step: dict[str, object], refused: Callable[[str], CheckpointError]) -> tuple[str, bool]:
    if step.get("replacement") != SPACE:
        raise refused(f"its Metaspace replacement is {quoted(step.get('replacement'), 40)}")
    default = "always" if step.get("add_prefix_space", True) else "never"  # the older key
    scheme = step.get("prepend_scheme", default)
    if scheme not in ("always", "first", "never"):
        raise refused(f"its Metaspace prepend_scheme is {quoted(scheme, 40)}")
    return str(scheme), step.get("split", True) is not False


def _isolated(step: dict[str, object]) -> tuple[str, ...]:
    """The names that a `Split` isolates, if its pattern is nothing else: transformers 5 for user-defined pieces."""
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    isolates = step.get("type") == "Split" and step.get("behavior") == "Isolated" and step.get("invert") is False
    if not isolates or not isinstance(regex, str):
        return ()
    names = [_UNESCAPED.sub(r"\1", part) for part in re.split(r"(?<!\\)\|", regex)]
    return tuple(names) if all(names) and "|".join(map(re.escape, names)) == regex else ()


def _types(steps: list[dict[str, object]]) -> str:
    return " + ".join(quoted(step.get("type"), 40) for step in steps) or "missing"
