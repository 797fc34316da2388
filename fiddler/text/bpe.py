"""Byte-level BPE (GPT-2's kind) over Hugging Face's `tokenizers` library: `BytePairEncoder`.

Bytes are letters: each of the 256 has a printable character of its own in token names, so a name is read back as
bytes. Built from a GGUF's tokens, merges and the name of a pre-tokeniser. Knows no special tokens in a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from fiddler.errors import FileFormatError, RequestError, quoted
from fiddler.text.bpe_letters import LETTERS, decoded, missing_letters
from fiddler.text.byte_level_keys import ByteLevelKeys
from fiddler.text.escaped_bytes import ESCAPED, SURROGATE, raw_bytes
from fiddler.text.pre_tokenizers import DIGITS, PRE_TOKENIZERS
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import TokenTable

__all__ = ["BytePairEncoder", "chunks"]

_LONG, _LONGEST_RUN = 1 << 20, 1 << 21  # [characters]; the library's search gives up on runs of five millions
_CUT = re.compile(r"(?<=\S\n)(?=[A-Za-z])")
_RUN = re.compile(r"\s+|\S+")
# `\s+$` tries every blank of a run as its beginning, and is quadratic; only the first of the run matters.
_LINEAR = {r"\s+$": r"(?<!\s)\s+$"}


class BytePairEncoder:
    """One vocabulary's byte-level BPE. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        """Raises FileFormatError where the tokens and merges make no byte-level BPE."""
        keys = table.byte_level
        assert keys is not None
        self.pieces = [_decoded(text, kind) for text, kind in zip(table.texts, table.types, strict=True)]
        ids = _unique_ids(table)
        ordinary = {text: index for text, index in ids.items() if table.types[index] == TokenType.NORMAL}
        self.byte_ids = {byte: ordinary[letter] for byte, letter in enumerate(LETTERS) if letter in ordinary}
        if missing := missing_letters(ordinary):
            raise FileFormatError(
                f"the vocabulary lacks tokens for {len(missing)} bytes, {missing[0]:#04x} among them; "
                "byte-level BPE needs one for each"
            )
        self._tokenizer = _tokenizer(table, keys, ids)
        self._replacement = [self.byte_ids[byte] for byte in "\ufffd".encode()]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which an escaped byte is not UTF-8; one without a token becomes U+FFFD.

        Raises RequestError where the text has a run of millions of characters without a blank, or of blanks.
        """
        if len(text) > _LONG:
            _check_runs(text)
        ids: list[int] = []
        for position, part in enumerate(ESCAPED.split(text)):
            if position % 2:
                index = self.byte_ids.get(ord(part) - 0xDC00)
                ids += self._replacement if index is None else [index]
            elif part:
                for chunk in chunks(part, _LONG):
                    ids += self._tokenizer.encode(chunk, add_special_tokens=False).ids
        return ids


def chunks(text: str, size: int) -> Iterator[str]:
    """Parts of `text` whose ids are those of the whole, of a little more than `size` characters where it has places.

    The library takes some hundred bytes a character. A place: before an ASCII letter, behind a line break that follows
    no blank. Every pre-tokenizer cuts a text there, and cuts the parts as it does the whole.
    """
    begin = 0
    while len(text) - begin > size and (place := _CUT.search(text, begin + size)) is not None:
        yield text[begin : place.start()]
        begin = place.start()
    yield text[begin:]


def _decoded(name: str, kind: int) -> bytes:
    """A token's text; as in the library, a name with other characters than letters stands for itself."""
    if kind == TokenType.USER_DEFINED:
        return raw_bytes(name)
    if kind != TokenType.NORMAL:
        return b""
    data = decoded(name)
    return raw_bytes(name) if data is None else data


def _unique_ids(table: TokenTable) -> dict[str, int]:
    """Text -> id. Raises FileFormatError where two tokens have one text, which llama.cpp does not load either."""
    ids: dict[str, int] = {}
    for index, text in enumerate(table.texts):
        if text and ids.setdefault(text, index) != index:
            raise FileFormatError(f"tokens {ids[text]} and {index} are both called {quoted(text, 60)}")
    return ids


def _tokenizer(table: TokenTable, keys: ByteLevelKeys, ids: dict[str, int]) -> Tokenizer:
    """The library's tokenizer of ordinary text; no text yields a control token."""
    barred = {TokenType.CONTROL, TokenType.UNKNOWN}
    pairs: list[tuple[str, str]] = []
    # The library takes no name that is not UTF-8, and no text yields one.
    ids = {text: index for text, index in ids.items() if not SURROGATE.search(text)}
    vocabulary = {text: index for text, index in ids.items() if table.types[index] == TokenType.NORMAL}
    for rank, merge in enumerate(keys.merges):
        left, space, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
        if not space or " " in right:
            raise FileFormatError(
                f"merge {rank} is {quoted(merge, 60)}; it must be two tokens with a space between them"
            )
        for text in (left, right, left + right):
            if text not in vocabulary:
                index = ids.get(text)
                if index is None:
                    raise FileFormatError(f"merge {rank} needs {quoted(text, 60)}, which is no token")
                if table.types[index] in barred:
                    break
                vocabulary[text] = index
        else:
            pairs.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=keys.ignore_merges))
    if keys.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(_step(step) for step in PRE_TOKENIZERS[keys.pre].steps),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _step(step: str) -> pre_tokenizers.PreTokenizer:
    if step == DIGITS:
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(_LINEAR.get(step, step)), "isolated")


def _check_runs(text: str) -> None:
    longest = max(match.end() - match.start() for match in _RUN.finditer(text))
    if longest > _LONGEST_RUN:
        raise RequestError(
            f"the text has a run of {longest} characters without a blank, or of blanks; at most {_LONGEST_RUN} are read"
        )
