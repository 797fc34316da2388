"""Finds control and user-defined tokens in a text, as Hugging Face's `tokenizers` library finds added tokens.

From the left, at each place the longest name; tokens marked `normalized` in what the others leave over. The library
does it, in time linear in the text however many names there are. (llama.cpp looks for one name after the other in the
whole text, the longest first; that differs where names overlap.) Knows names and options; not the text between them.
"""

from __future__ import annotations

from collections.abc import Mapping

from fiddler.text.escaped_bytes import ESCAPED, SURROGATE
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import TokenTable

__all__ = ["SpecialTokens"]

_STAND_INS = tuple(map(chr, range(0xFDD0, 0xFDF0)))  # characters of no text, for bytes that are not UTF-8
_FEW = 16  # beginnings of names to look for before the library does
_ORDINARY = {TokenType.NORMAL, TokenType.BYTE, TokenType.UNUSED}


class SpecialTokens:
    """The tokens of a vocabulary that are recognised by their names. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        ids: dict[str, int] = {}  # of a name that occurs twice, the first
        for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True)):
            if kind not in _ORDINARY and text:
                ids.setdefault(text, index)
        self._user_defined = {name for name, index in ids.items() if table.types[index] == TokenType.USER_DEFINED}
        control = [name for name in ids if name not in self._user_defined]
        self.control_names = sorted(control, key=lambda name: -len(name))
        self._ids = {name: index for name, index in ids.items() if not SURROGATE.search(name)}
        self._options = table.added_token_ids
        self._nfc = table.byte_level is not None and table.byte_level.nfc
        self._finders: dict[tuple[bool, bool], list[_Finder]] = {}

    def split(self, text: str, parse_special: bool, barred: bool = False) -> list[str | int]:
        """`text` split at special tokens, each replaced by its id; no part is empty.

        Without `parse_special` only user-defined tokens are recognised. `barred`: no control token of one character is.
        Where the tokenizer composes characters and has `normalized` tokens, the text comes back composed.
        """
        key = (parse_special, parse_special and barred)
        if key not in self._finders:
            self._finders[key] = self._made(*key)
        parts: list[str | int] = [text] if text else []
        for finder in self._finders[key]:
            parts = [found for part in parts for found in (finder.split(part) if isinstance(part, str) else (part,))]
        return parts

    def _made(self, parse_special: bool, barred: bool) -> list[_Finder]:
        """Finders to apply in turn; two where the second's names are those in the composed text."""
        ids = {
            name: index
            for name, index in self._ids.items()
            if name in self._user_defined or (parse_special and not (barred and len(name) == 1))
        }
        late = self._options["normalized"] if self._nfc else frozenset()
        first = {name: index for name, index in ids.items() if index not in late}
        second = {name: index for name, index in ids.items() if index in late}
        finders = [_Finder(first, self._options, nfc=False)] if first else []
        return [*finders, _Finder(second, self._options, nfc=True)] if second else finders


class _Finder:
    """Finds names in a text; `nfc`: both are composed first."""

    def __init__(self, ids: Mapping[str, int], options: Mapping[str, frozenset[int]], nfc: bool) -> None:
        from tokenizers import AddedToken, Tokenizer, models, normalizers  # late: most files need nothing of it

        self._nfc = normalizers.NFC() if nfc else None
        names = {self._composed(name): index for name, index in ids.items()}
        self._begins = {name[:2] for name in names}
        used = set().union(*names)
        self._stand_in = next((character for character in _STAND_INS if character not in used), "\uffff")
        # A text without these names is one unknown token of this model.
        self._tokenizer = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        self._tokenizer.add_tokens(
            [
                AddedToken(name, **{option: index in having for option, having in options.items()})
                for name, index in names.items()
            ]
        )
        self._ids = {self._tokenizer.token_to_id(name): index for name, index in names.items()}  # the library's -> ours

    def split(self, text: str) -> list[str | int]:
        """The text's parts and the ids between them."""
        text = self._composed(text)
        if len(self._begins) <= _FEW and not any(begin in text for begin in self._begins):
            return [text] if text else []  # as most texts: the library takes a second for a megabyte
        valid = text if text.isascii() else SURROGATE.sub(self._stand_in, text)
        found = self._tokenizer.encode(valid, add_special_tokens=False)
        return [
            self._ids[index] if index in self._ids else text[begin:end]
            for index, (begin, end) in zip(found.ids, found.offsets, strict=True)
        ]

    def _composed(self, text: str) -> str:
        if self._nfc is None:
            return text
        parts = ESCAPED.split(text)
        return "".join(part if place % 2 else self._nfc.normalize_str(part) for place, part in enumerate(parts))
