"""SentencePiece's BPE over the `sentencepiece` library: `SentencePieceEncoder`.

Built from a GGUF's tokens and scores. Knows no special tokens in a text.
"""

from __future__ import annotations

import re

import sentencepiece

from fiddler.errors import FileFormatError
from fiddler.text.escaped_bytes import ESCAPED, raw_bytes
from fiddler.text.sentencepiece_model import ModelType, SentencePieceModel, TokenType
from fiddler.text.vocabulary import SPACE, TokenTable

__all__ = ["SentencePieceEncoder"]
_UNREACHABLE = re.compile(r"[\0\ud800-\udfff]")  # characters that the library refuses in pieces or in texts
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceEncoder:
    """One vocabulary's SentencePiece BPE. Safe to share between threads."""

    def __init__(self, table: TokenTable) -> None:
        """Raises FileFormatError where one of the 256 byte tokens is missing: some text would have no ids."""
        self.pieces, self.byte_ids = _decoded_tokens(table)
        self._processor = _processor_of(table, self.byte_ids)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which an escaped byte is not UTF-8; the library adds no prefix."""
        ids: list[int] = []
        # No token spans a byte that is not UTF-8: the text between such bytes is encoded separately.
        for position, part in enumerate(ESCAPED.split(text)):
            if position % 2:
                ids.append(self.byte_ids[ord(part) - 0xDC00])
            elif part:
                ids += self._processor.encode(part)
        return ids


def _decoded_tokens(table: TokenTable) -> tuple[list[bytes], dict[int, int]]:
    """Each token's text as bytes, by id, and byte -> id of its byte token.

    Raises FileFormatError where a byte token is malformed or missing.
    """
    decoded: list[bytes] = []
    byte_ids: dict[int, int] = {}
    for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True)):
        if kind == TokenType.NORMAL:
            decoded.append(raw_bytes(text.replace(SPACE, " ")))
        elif kind == TokenType.USER_DEFINED:
            decoded.append(raw_bytes(text))
        elif kind == TokenType.BYTE:
            match = _BYTE.fullmatch(text)
            if match is None:
                raise FileFormatError(
                    f"token {index} is a byte token called {text[:40]!r}; it must be called <0x00> to <0xFF>"
                )
            byte = int(match[1], 16)
            decoded.append(bytes([byte]))
            byte_ids.setdefault(byte, index)
        else:
            decoded.append(b"")
    missing = [byte for byte in range(256) if byte not in byte_ids]
    if missing:
        raise FileFormatError(
            f"the vocabulary lacks {len(missing)} of the 256 byte tokens, <0x{missing[0]:02X}> among them; "
            "only tokenizers with byte fallback are supported"
        )
    return decoded, byte_ids


def _processor_of(table: TokenTable, byte_ids: dict[int, int]) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model with the same ids, which adds no prefix and leaves spaces alone.

    The library refuses a piece that is empty or occurs twice. Of several tokens with the same text, encoding yields the
    last, as in llama.cpp's own table. The rest, and every token that ordinary text must not yield, get a placeholder
    name. Raises FileFormatError where the library refuses the model.
    """
    id_by_text: dict[str, int] = {}
    for token_type in (TokenType.UNUSED, TokenType.NORMAL):
        for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True)):
            if kind == token_type and text and not _UNREACHABLE.search(text):
                id_by_text[text] = index
    byte_token_ids = set(byte_ids.values())
    pieces: list[bytes] = []
    types: list[int] = []
    for index, (text, kind) in enumerate(zip(table.texts, table.types, strict=True)):
        if index in byte_token_ids or id_by_text.get(text) == index:
            pieces.append(text.encode())
            types.append(kind)
        else:
            pieces.append(b"[%d]" % index)
            types.append(TokenType.CONTROL)
    model = SentencePieceModel(
        # The library requires an unknown token; with all byte tokens present it never returns it.
        pieces=(*pieces, b"<unk>"),
        scores=(*table.scores, 0.0),
        types=(*types, TokenType.UNKNOWN),
        model_type=ModelType.BPE,
        byte_fallback=True,
        normalizer=b"identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model.to_bytes())
    except (RuntimeError, ValueError) as error:
        raise FileFormatError(
            f"the vocabulary makes no SentencePiece model: {str(error).splitlines()[0][:200]}"
        ) from error
