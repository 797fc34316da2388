"""Added tokens as `tokenizer.json` and `tokenizer_config.json` write them.

Knows the notation; not which file takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass

from fiddler.errors import CheckpointError, quoted
from fiddler.text.vocabulary import ADDED_TOKEN_IDS, LARGEST_VOCABULARY

__all__ = ["AddedToken", "added_tokens"]


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text before anything else."""

    id: int
    text: str
    special: bool
    options: frozenset[str] = frozenset()  # see fiddler.text.vocabulary.ADDED_TOKEN_IDS

    @property
    def plain(self) -> bool:
        """Whether it is matched wherever it occurs, and nothing but it."""
        return not self.options & {"lstrip", "rstrip", "single_word"}

    @property
    def normalized(self) -> bool:
        """Whether it is matched in the normalised text."""
        return "normalized" in self.options


def added_tokens(value: object, where: str) -> list[AddedToken]:
    """Added tokens as `tokenizer.json` (a list) or `tokenizer_config.json` (an object by id) writes them.

    Raises CheckpointError, its message beginning with `where`, if they are malformed.
    """
    if isinstance(value, dict):
        return [_token(key, entry, where) for key, entry in value.items()]
    if isinstance(value, list):
        return [_token(entry.get("id") if isinstance(entry, dict) else None, entry, where) for entry in value]
    if value is None:
        return []
    raise CheckpointError(f"{where} is {quoted(value, 40)}; it must be a list or an object")


def _token(index: object, entry: object, where: str) -> AddedToken:
    if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
        index = int(index)
    if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < LARGEST_VOCABULARY:
        text = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(entry, dict) and isinstance(text, str) and text:
            options = frozenset(option for option in ADDED_TOKEN_IDS if entry.get(option) is True)
            return AddedToken(index, text, entry.get("special") is True, options)
    raise CheckpointError(f"{where}: {quoted(index, 40)} is {quoted(entry, 60)}; it must be an id and a token")
