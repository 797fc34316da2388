"""Text to token ids and back, as SentencePiece and llama.cpp's `llama` tokenizer do it.

`Tokenizer` rebuilds a SentencePiece model from the tokens that a GGUF holds and leaves ordinary text to the
`sentencepiece` library; around it stand the parts that the library does another way than the model's own
stack: special tokens, bytes that are no UTF-8, and decoding piece by piece. It knows neither files nor the
network, and applies no chat template.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping

from fiddler.errors import RequestError
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.spm import canonical, decoded_tokens, processor_of, raw_bytes
from fiddler.text.vocabulary import SPACE, TokenTable

__all__ = ["TextStream", "Tokenizer"]
_ESCAPED = re.compile(r"([\udc80-\udcff])")  # a byte that is no UTF-8, as Python's "surrogateescape" carries it
_BLANK = (" ", SPACE)


class Tokenizer:
    """One vocabulary, both ways. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        """Raises FileFormatError where the 256 byte tokens are not complete: without them some text has no
        ids.
        """
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
        """Build from a GGUF's key/values: strings as `str` and `list[str]`, numeric arrays as 1-D numpy
        arrays.

        Raises FileFormatError where a key is missing, malformed or out of range.
        """
        return cls(TokenTable.from_metadata(metadata))

    @property
    def vocab_size(self) -> int:
        """The number of tokens, unused ones included."""
        return len(self._bytes)

    @property
    def bos_id(self) -> int:
        """The token that begins a text; without `add_bos` the model may know none, and this is llama.cpp's default."""
        return self._table.bos_id

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        return self._table.eos_id

    @property
    def end_ids(self) -> frozenset[int]:
        """Every token that ends a generation: `eos_id`, and ends of a turn by key or by name."""
        return self._table.end_ids

    @property
    def add_bos(self) -> bool:
        """Whether the model wants `bos_id` before a text."""
        return self._table.add_bos

    @property
    def add_eos(self) -> bool:
        """Whether the model wants `eos_id` behind a text."""
        return self._table.add_eos

    @property
    def add_space_prefix(self) -> bool:
        """Whether a space goes before a text, which decoding takes off again."""
        return self._table.add_space_prefix

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that the file carries, unread."""
        return self._table.chat_template

    @property
    def control_names(self) -> list[str]:
        """What `parse_special` finds in a text and what an ordinary text must not bring about; the longest first."""
        types = self._table.types
        return [name for name, index in self._all_special if types[index] != TokenType.USER_DEFINED]

    def token(self, index: int) -> str:
        """The token's name in the vocabulary: `▁the`, `<0x0A>`, `</s>`."""
        return self._table.texts[self._checked(index)]

    def pieces(self, special: bool = False) -> list[bytes]:
        """Each token's text as bytes, by id: what it adds to a text that goes on. Control, unknown and unused tokens
        add none; with `special` their names are given.
        """
        if not special:
            return list(self._bytes)
        return [found or raw_bytes(text) for found, text in zip(self._bytes, self._table.texts, strict=True)]

    def encode(
        self,
        text: str | bytes,
        add_bos: bool = False,
        parse_special: bool = False,
        continuing: bool = False,
        *,
        bar: str = "",
    ) -> list[int]:
        """The ids of `text`; those of SentencePiece wherever no special token is in play.

        Bytes that are no UTF-8 (in `bytes`, or in a `str` as `surrogateescape` leaves them) become byte
        tokens; any other lone surrogate becomes U+FFFD. User-defined tokens are recognised in the text;
        control tokens only with `parse_special`, so that what a user typed never turns into one. As in
        llama.cpp the longest token is looked for first, and the space that goes before a text also goes
        before what follows a special token. `add_bos` puts `bos_id` first. `continuing`: the text goes on from an
        earlier one, and no space goes before it.

        `bar`: a character across which no special token is recognised, and which counts for nothing else; where it
        is given, control tokens of a single character, which it could not keep apart, are not recognised at all.
        """
        ids = [self.bos_id] if add_bos else []
        prefix = self._table.add_space_prefix and not continuing
        special = self._all_special if parse_special else self._user_defined
        if bar:
            types = self._table.types
            special = [(name, i) for name, i in special if len(name) > 1 or types[i] == TokenType.USER_DEFINED]
        for part in self._split(canonical(text), special):
            if isinstance(part, int):
                ids.append(part)
                prefix = self._table.add_space_prefix and self._table.prepend_scheme != "first"
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
        """The text of `ids`, U+FFFD for each byte that is no UTF-8.

        Control and unused tokens give no text, and the space that `encode` put first is taken off again,
        unless the ids go on from earlier ones (`continuing`). Raises RequestError for an id outside the
        vocabulary.
        """
        return _visible(self.decode_bytes(ids, continuing).decode("utf-8", "surrogateescape"))

    def decode_bytes(self, ids: Iterable[int], continuing: bool = False) -> bytes:
        """The text of `ids` as bytes, exactly; see `decode`."""
        decoder = self.stream(continuing)
        return b"".join([decoder.push_bytes(index) for index in ids])

    def stream(self, continuing: bool = False) -> TextStream:
        """A decoder to be fed one id at a time; `continuing` where the ids go on from a prompt."""
        return TextStream(self, continuing)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self._bytes):
            raise RequestError(f"token id {index} is outside the vocabulary of {len(self._bytes)} tokens")
        return index

    def _split(self, text: str, special: list[tuple[str, int]]) -> list[str | int]:
        """`text` cut at special tokens, each replaced by its id; no part is empty."""
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
        """Ids of text without special tokens and without a prefix of the library's making."""
        ids: list[int] = []
        # No token reaches across a byte that is no UTF-8: what lies between such bytes is encoded by itself.
        for position, part in enumerate(_ESCAPED.split(text)):
            if position % 2:
                ids.append(self._byte_ids[part])
            elif part:
                ids += self._processor.encode(part)
        return ids


class TextStream:
    """Decodes ids as they come, never cutting a character; the parts add up to `Tokenizer.decode`."""

    def __init__(self, tokenizer: Tokenizer, continuing: bool) -> None:
        self._tokenizer = tokenizer
        self._prefixed = tokenizer._table.add_space_prefix and not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def push(self, index: int) -> str:
        """The text that is complete with this id; may be empty. Raises RequestError for an unknown id."""
        return _visible(self._utf8.decode(self.push_bytes(index)))

    def push_bytes(self, index: int) -> bytes:
        """This id's bytes as they are, for a caller who wants no text; use either this or `push`."""
        found = self._tokenizer._bytes[self._tokenizer._checked(index)]
        if self._prefixed and found:
            self._prefixed = False  # the space before a text is in its first token that has any
            if self._tokenizer._table.types[index] == TokenType.NORMAL:
                return found.removeprefix(b" ")
        return found

    def finish(self) -> str:
        """What was held back: U+FFFD for each byte of a character that never became whole."""
        return _visible(self._utf8.decode(b"", final=True))


def _visible(text: str) -> str:
    return _ESCAPED.sub("\ufffd", text)
