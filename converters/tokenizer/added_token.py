"""A token added to a tokenizer, as two of Hugging Face's files write it.

Knows the notation, not which file wins.
"""

from __future__ import annotations

from dataclasses import dataclass

from fiddler.errors import CheckpointError, quoted
from fiddler.text.vocabulary import LARGEST_VOCABULARY

__all__ = ["AddedToken", "added_tokens"]


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in the text before anything else."""

    id: int
    text: str
    special: bool
    strips: bool = False  # takes white space beside it along, or wants to be a word by itself
    normalized: bool = False  # looked for in the text as the normaliser left it


def added_tokens(value: object, where: str) -> list[AddedToken]:
    """Added tokens as `tokenizer.json` (a list) or `tokenizer_config.json` (an object by id) writes them.

    Raises CheckpointError, its message beginning with `where`, where they are malformed.
    """
    if isinstance(value, dict):
        return [_token(key, one, where) for key, one in value.items()]
    if isinstance(value, list):
        return [_token(one.get("id") if isinstance(one, dict) else None, one, where) for one in value]
    if value is None:
        return []
    raise CheckpointError(f"{where} is {quoted(value, 40)}; it must be a list or an object")


def _token(index: object, one: object, where: str) -> AddedToken:
    if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
        index = int(index)
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < LARGEST_VOCABULARY:
        text = one.get("content") if isinstance(one, dict) else None
        if isinstance(one, dict) and isinstance(text, str) and text:
            strips = any(one.get(key) is True for key in ("single_word", "lstrip", "rstrip"))
            return AddedToken(index, text, one.get("special") is True, strips, one.get("normalized") is True)
    raise CheckpointError(f"{where}: {quoted(index, 40)} is {quoted(one, 60)}; it must be an id and a token")
