"""Text to token ids and back, with SentencePiece's BPE or byte-level BPE, as the GGUF says: `Tokenizer`.

Ordinary text is left to the encoder of the file's kind (`spm`, `bpe`) and its library. This file adds the parts where
the libraries differ from a model's own stack: special tokens, bytes that are not UTF-8, and decoding token by token.
Knows neither files nor the network, and applies no chat template.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from functools import cached_property
from operator import index as whole
from typing import Protocol

from fiddler.errors import RequestError, flag_of, quoted
from fiddler.text.escaped_bytes import ESCAPED, canonical, raw_bytes
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.special_tokens import SpecialTokens
from fiddler.text.vocabulary import SPACE, TokenTable

__all__ = ["TextStream", "Tokenizer"]
_BLANK = (" ", SPACE)
_COMPOSED = 3  # NFC makes a text shorter by this factor at most: three Korean letters of 3 bytes are one syllable of 3


class _Encoder(Protocol):
    """One kind of BPE over one vocabulary."""

    pieces: list[bytes]  # each token's text, by id; b"" for those without
    byte_ids: dict[int, int]  # byte -> id of its token

    def encode(self, text: str) -> list[int]:
        """The ids of text without special tokens; a byte that is not UTF-8 is escaped in it."""


class Tokenizer:
    """Encodes and decodes with one vocabulary. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        """Raises FileFormatError where the vocabulary makes no tokenizer, as where some text would have no ids."""
        self._table = table
        self._encoder = _encoder(table)
        self._bytes = self._encoder.pieces
        self._special = SpecialTokens(table)

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Tokenizer:
        """Build from a GGUF's metadata: strings as `str` and `list[str]`, numeric arrays as 1-D numpy arrays.

        Raises FileFormatError where a key is missing, malformed or out of range.
        """
        return cls(TokenTable.from_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, unused ones included."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        """The token that begins a text. Without `add_bos` the model may have none: then this is llama.cpp's default."""
        return self._table.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self._table.eos_id

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a generation: `eos_id`, and end-of-turn tokens by metadata key or by name."""
        return self._table.end_ids

    @property
    def add_bos(self) -> bool:
        """Whether the model expects `bos_id` before a text."""
        return self._table.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether the model expects `eos_id` after a text."""
        return self._table.add_eos

    @property
    def add_space_prefix(self) -> bool:
        """Whether encoding puts a space before a text; decoding removes it."""
        return self._table.add_space_prefix

    @property
    def chat_template(self) -> str | None:
        """The file's chat template: Jinja source, not parsed."""
        return self._table.chat_template

    @property
    def control_names(self) -> list[str]:
        """Names that only `parse_special` recognises and a user's text must not produce; the longest first."""
        return list(self._special.control_names)

    @property
    def byte_ids(self) -> dict[int, int]:
        """Byte -> id of the token that is this byte alone. Byte-level vocabularies may lack bytes of no text."""
        return self._encoder.byte_ids

    @cached_property
    def longest_token(self) -> int:
        """Length of the longest token's name [bytes]: `n` ids hold at most `n` times as many bytes of text."""
        longest = max(len(raw_bytes(text)) for text in self._table.texts)
        keys = self._table.byte_level
        return longest * _COMPOSED if keys is not None and keys.nfc else longest

    def token(self, index: int) -> str:
        """The token's name in the vocabulary: `▁the`, `<0x0A>`, `</s>`."""
        return self._table.texts[self._checked(index)]

    def pieces(self, special: bool = False) -> list[bytes]:
        """Each token's text as bytes, by id, as it continues a text.

        Control, unknown and unused tokens have none; with `special` they have their names.
        """
        if not flag_of("special", special):
            return list(self._bytes)
        return [piece or raw_bytes(text) for piece, text in zip(self._bytes, self._table.texts, strict=True)]

    def encode(
        self,
        text: str | bytes,
        add_bos: bool = False,
        parse_special: bool = False,
        continuing: bool = False,
        *,
        bar: str = "",
    ) -> list[int]:
        """The ids of `text`; those of the kind's library wherever the text holds no special token.

        Bytes that are not UTF-8 (in `bytes`, or in a `str` as `surrogateescape` encodes them) become byte tokens; any
        other lone surrogate becomes U+FFFD. User-defined tokens are recognised in the text; control tokens only with
        `parse_special`, so that a user's text never produces one. They match from the left, the longest first, with the
        options of `ADDED_TOKEN_IDS` in `fiddler.text.vocabulary`. As in llama.cpp, the space before a text also goes
        before text that follows a special token, unless the file says otherwise (`PREPEND_SCHEME`, `IN_TEXT_IDS`
        there). `add_bos` puts `bos_id` first. `continuing`: the text continues an earlier one, and gets no space.

        `bar`: a character across which no special token is recognised, and which is dropped. With a bar, control tokens
        of a single character are not recognised at all: a bar cannot split them.
        """
        if not isinstance(text, str | bytes):
            raise RequestError(f"the text is {quoted(text)}; give a str, or bytes")
        for name, value in (("add_bos", add_bos), ("parse_special", parse_special), ("continuing", continuing)):
            flag_of(name, value)
        if not isinstance(bar, str) or len(bar) > 1:
            raise RequestError(f"bar is {quoted(bar)}; give a character, or none")
        ids = [self.bos_id] if add_bos else []
        prefix = self._table.add_space_prefix and not continuing
        for part in self._special.split(canonical(text), parse_special, barred=bool(bar)):
            if isinstance(part, int):
                in_text = part in self._table.in_text_ids
                if in_text and prefix and not (self._table.prepend_scheme and self.token(part).startswith(_BLANK)):
                    ids += self._encoder.encode(" ")
                ids.append(part)
                prefix = not in_text and self._table.add_space_prefix and self._table.prepend_scheme != "first"
                continue
            if bar:
                part = part.replace(bar, "")
                if not part:
                    continue
            if prefix and not (self._table.prepend_scheme and part.startswith(_BLANK)):
                part = " " + part
            ids += self._encoder.encode(part)
            prefix = False
        return ids

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """The text of `ids`, with U+FFFD for each byte that is not UTF-8.

        Control and unused tokens have no text. The space that `encode` put first is removed, unless the ids continue
        earlier ones (`continuing`). Raises RequestError for an id outside the vocabulary.
        """
        return _visible(self.decode_bytes(ids, continuing).decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Iterable[int], continuing: bool = False) -> bytes:
        """The text of `ids` as bytes, exactly; see `decode`. Raises RequestError, too, where `ids` are no ids."""
        decoder = self.stream(continuing)
        try:
            remaining = iter(ids)
        except TypeError:
            raise RequestError(f"the ids are {quoted(ids)}; give a list of token ids") from None
        return b"".join([decoder.push_bytes(index) for index in remaining])

    def stream(self, continuing: bool = False, named_tokens: frozenset[int] = frozenset()) -> TextStream:
        """A decoder that takes one id at a time; `continuing`: the ids continue a prompt.

        named_tokens: tokens without text, as control tokens, for which the text has their names.
        """
        return TextStream(self, flag_of("continuing", continuing), named_tokens)

    def _checked(self, index: int) -> int:
        try:
            number = whole(index)
        except TypeError:
            raise RequestError(f"a token id is {quoted(index)}; it must be a whole number") from None
        if not 0 <= number < len(self._bytes):
            raise RequestError(f"token id {quoted(number)} is outside the vocabulary of {len(self._bytes)} tokens")
        return number


def _encoder(table: TokenTable) -> _Encoder:
    if table.byte_level is None:
        from fiddler.text.spm import SentencePieceEncoder  # late: only one of the two libraries is needed

        return SentencePieceEncoder(table)
    from fiddler.text.bpe import BytePairEncoder

    return BytePairEncoder(table)


class TextStream:
    """Decodes ids one at a time and never splits a character; the parts add up to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, continuing: bool, named_tokens: frozenset[int] = frozenset()) -> None:
        self._tokenizer, self._named_tokens = tokenizer, named_tokens
        self._prefixed = tokenizer._table.add_space_prefix and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, index: int) -> str:
        """The text that is complete with this id; may be empty. Raises RequestError for an unknown id."""
        return _visible(self._utf8.decode(self.push_bytes(index)))

    def push_bytes(self, index: int) -> bytes:
        """This id's exact bytes, for a caller that needs no text; use either this or `push`."""
        piece = self._tokenizer._bytes[self._tokenizer._checked(index)]
        if not piece and index in self._named_tokens:
            return raw_bytes(self._tokenizer.token(index))
        if self._prefixed and piece:
            self._prefixed = False  # the first token with text holds the space before it
            if self._tokenizer._table.types[index] == TokenType.NORMAL:
                return piece.removeprefix(b" ")
        return piece

    def finish(self) -> str:
        """The text held back so far: U+FFFD for each byte of an incomplete character."""
        return _visible(self._utf8.decode(b"", final=True))


def _visible(text: str) -> str:
    return ESCAPED.sub("\ufffd", text)
