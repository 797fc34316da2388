"""Finds control and user-defined tokens in a text, as Hugging Face's `tokenizers` library finds added tokens.

From the left, at each place the longest name; tokens marked `normalized` in what the others leave over. The library
does it, in time linear in the text however many names there are. (llama.cpp looks for one name after the other in the
whole text, the longest first; that differs where names overlap.) Knows names and options; not the text between them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import TokenTable

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SpecialTokens"]

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # characters of no text, for bytes that are not UTF-8
_ORDINARY = {TokenType.NORMAL, TokenType.BYTE, TokenType.UNUSED}


class SpecialTokens:
    """The tokens of a vocabulary that are recognised by their names. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        ids: dict[str, int] = {}  # of a name that occurs twice, the first
        for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True)):
            if kind not in _ORDINARY and text:
                ids.setdefault(text, index)
        self._table = table
        self._user_defined = {name for name, index in ids.items() if table.types[index] == TokenType.USER_DEFINED}
        control = [name for name in ids if name not in self._user_defined]
        self.control_names = sorted(control, key=lambda name: -len(name))
        self._ids = {name: index for name, index in ids.items() if not _SURROGATE.search(name)}
        used = set().union(*self._ids)
        self._stand_in = next((character for character in _STAND_INS if character not in used), "\uffff")
        self._splitters: dict[tuple[bool, bool], Tokenizer | None] = {}

    def split(self, text: str, parse_special: bool, barred: bool = False) -> list[str | int]:
        """`text` split at special tokens, each replaced by its id; no part is empty.

        Without `parse_special` only user-defined tokens are recognised. `barred`: no control token of one character is.
        """
        key = (parse_special, parse_special and barred)
        if key not in self._splitters:
            self._splitters[key] = self._splitter(*key)
        splitter = self._splitters[key]
        if splitter is None:
            return [text] if text else []
        valid = text if text.isascii() else _SURROGATE.sub(self._stand_in, text)
        found = splitter.encode(valid, add_special_tokens=False)
        return [
            self._ids[name] if name else text[begin:end]
            for name, (begin, end) in zip(found.tokens, found.offsets, strict=True)
        ]

    def _splitter(self, parse_special: bool, barred: bool) -> Tokenizer | None:
        """A tokenizer whose added tokens are these and whose every other text is one unknown token."""
        names = [
            name
            for name in self._ids
            if name in self._user_defined or (parse_special and not (barred and len(name) == 1))
        ]
        if not names:
            return None
        from tokenizers import AddedToken, Tokenizer, models, normalizers  # late: most files need nothing of it

        splitter = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        if self._table.byte_level is not None and self._table.byte_level.nfc:
            splitter.normalizer = normalizers.NFC()
        options = self._table.added_token_ids
        splitter.add_tokens(
            [AddedToken(name, **{option: self._ids[name] in ids for option, ids in options.items()}) for name in names]
        )
        return splitter
