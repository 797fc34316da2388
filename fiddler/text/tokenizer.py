"""Text to token ids and back, as SentencePiece and llama.cpp's `llama` tokenizer do it.

`Tokenizer` rebuilds a SentencePiece model from a GGUF's vocabulary and leaves ordinary text to the `sentencepiece`
library. It adds the parts where the library differs from the model's own stack: special tokens, bytes that are not
UTF-8, and decoding token by token. Knows neither files nor the network, and applies no chat template.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from functools import cached_property

from fiddler.errors import RequestError, quoted
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.spm import canonical, decoded_tokens, processor_of, raw_bytes
from fiddler.text.vocabulary import SPACE, TokenTable

__all__ = ["TextStream", "Tokenizer"]
_ESCAPED = re.compile(r"([\udc80-\udcff])")  # a byte that is not UTF-8, as Python's "surrogateescape" encodes it
_BLANK = (" ", SPACE)


class Tokenizer:
    """Encodes and decodes with one vocabulary. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        """Raises FileFormatError where one of the 256 byte tokens is missing: some text would have no ids."""
        self._table = table
        self._bytes, byte_ids = decoded_tokens(table)
        self._byte_ids = {chr(0xDC00 + byte): index for byte, index in byte_ids.items() if byte >= 0x80}
        self._processor = processor_of(table, byte_ids)
        special = {TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED}
        named = {text: index for index, text in enumerate(table.texts) if text and table.types[index] in special}
        longest_first = sorted(named.items(), key=lambda item: (-len(raw_bytes(item[0])), item[1]))
        self._all_special = longest_first
        self._user_defined = [item for item in longest_first if table.types[item[1]] == TokenType.USER_DEFINED]

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
        types = self._table.types
        return [name for name, index in self._all_special if types[index] != TokenType.USER_DEFINED]

    @cached_property
    def longest_token(self) -> int:
        """Length of the longest token's name [bytes]: `n` ids hold at most `n` times as many bytes of text."""
        return max(len(raw_bytes(text)) for text in self._table.texts)

    def token(self, index: int) -> str:
        """The token's name in the vocabulary: `▁the`, `<0x0A>`, `</s>`."""
        return self._table.texts[self._checked(index)]

    def pieces(self, special: bool = False) -> list[bytes]:
        """Each token's text as bytes, by id, as it continues a text.

        Control, unknown and unused tokens have none; with `special` they have their names.
        """
        if not special:
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
        """The ids of `text`; those of SentencePiece wherever the text holds no special token.

        Bytes that are not UTF-8 (in `bytes`, or in a `str` as `surrogateescape` encodes them) become byte tokens; any
        other lone surrogate becomes U+FFFD. User-defined tokens are recognised in the text; control tokens only with
        `parse_special`, so that a user's text never produces one. As in llama.cpp, the longest special token matches
        first, and the space before a text also goes before text that follows a special token, unless the file says
        otherwise (`PREPEND_SCHEME`, `IN_TEXT_IDS` in `fiddler.text.vocabulary`). `add_bos` puts `bos_id` first.
        `continuing`: the text continues an earlier one, and gets no space.

        `bar`: a character across which no special token is recognised, and which is dropped. With a bar, control tokens
        of a single character are not recognised at all: a bar cannot split them.
        """
        if not isinstance(text, str | bytes):
            raise RequestError(f"the text is {quoted(text)}; give a str, or bytes")
        ids = [self.bos_id] if add_bos else []
        prefix = self._table.add_space_prefix and not continuing
        special = self._all_special if parse_special else self._user_defined
        if bar:
            types = self._table.types
            special = [(name, i) for name, i in special if len(name) > 1 or types[i] == TokenType.USER_DEFINED]
        for part in self._split(canonical(text), special):
            if isinstance(part, int):
                in_text = part in self._table.in_text_ids
                if in_text and prefix and not (self._table.prepend_scheme and self.token(part).startswith(_BLANK)):
                    ids += self._encode_text(" ")
                ids.append(part)
                prefix = not in_text and self._table.add_space_prefix and self._table.prepend_scheme != "first"
                continue
            if bar:
                part = part.replace(bar, "")
                if not part:
                    continue
            if prefix and not (self._table.prepend_scheme and part.startswith(_BLANK)):
                part = " " + part
            ids += self._encode_text(part)
            prefix = False
        return ids

    def decode(self, ids: Iterable[int], continuing: bool = False) -> str:
        """The text of `ids`, with U+FFFD for each byte that is not UTF-8.

        Control and unused tokens have no text. The space that `encode` put first is removed, unless the ids continue
        earlier ones (`continuing`). Raises RequestError for an id outside the vocabulary.
        """
        return _visible(self.decode_bytes(ids, continuing).decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Iterable[int], continuing: bool = False) -> bytes:
        """The text of `ids` as bytes, exactly; see `decode`."""
        decoder = self.stream(continuing)
        return b"".join([decoder.push_bytes(index) for index in ids])

    def stream(self, continuing: bool = False) -> TextStream:
        """A decoder that takes one id at a time; `continuing`: the ids continue a prompt."""
        return TextStream(self, continuing)

    def _checked(self, index: int) -> int:
        if not hasattr(index, "__index__"):
            raise RequestError(f"a token id is {quoted(index)}; it must be a whole number")
        if not 0 <= index < len(self._bytes):
            raise RequestError(f"token id {index} is outside the vocabulary of {len(self._bytes)} tokens")
        return index

    def _split(self, text: str, special: list[tuple[str, int]]) -> list[str | int]:
        """`text` split at special tokens, each replaced by its id; no part is empty."""
        parts: list[str | int] = [text] if text else []
        for name, index in special:
            if name not in text:
                continue
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                for position, piece in enumerate(part.split(name)):
                    if position:
                        cut.append(index)
                    if piece:
                        cut.append(piece)
            parts = cut
        return parts

    def _encode_text(self, text: str) -> list[int]:
        """Ids of text without special tokens; the library adds no prefix."""
        ids: list[int] = []
        # No token spans a byte that is not UTF-8: the text between such bytes is encoded separately.
        for position, part in enumerate(_ESCAPED.split(text)):
            if position % 2:
                ids.append(self._byte_ids[part])
            elif part:
                ids += self._processor.encode(part)
        return ids


class TextStream:
    """Decodes ids one at a time and never splits a character; the parts add up to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, continuing: bool) -> None:
        self._tokenizer = tokenizer
        self._prefixed = tokenizer._table.add_space_prefix and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, index: int) -> str:
        """The text that is complete with this id; may be empty. Raises RequestError for an unknown id."""
        return _visible(self._utf8.decode(self.push_bytes(index)))

    def push_bytes(self, index: int) -> bytes:
        """This id's exact bytes, for a caller that needs no text; use either this or `push`."""
        piece = self._tokenizer._bytes[self._tokenizer._checked(index)]
        if self._prefixed and piece:
            self._prefixed = False  # the first token with text holds the space before it
            if self._tokenizer._table.types[index] == TokenType.NORMAL:
                return piece.removeprefix(b" ")
        return piece

    def finish(self) -> str:
        """The text held back so far: U+FFFD for each byte of an incomplete character."""
        return _visible(self._utf8.decode(b"", final=True))


def _visible(text: str) -> str:
    return _ESCAPED.sub("\ufffd", text)
