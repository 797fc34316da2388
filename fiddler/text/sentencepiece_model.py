"""Reads and writes SentencePiece's model file (`tokenizer.model`), as far as a BPE tokenizer needs it.

The file is one protobuf message, `ModelProto` of sentencepiece_model.proto
(https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto). Two widely used packages each
register their own copy of its descriptor with `protobuf`, and one process can hold only one of them. So this file
parses the wire format (https://protobuf.dev/programming-guides/encoding/) itself: it is small.

Knows neither GGUF, nor the meaning of a piece, nor whether a model can run. Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = ["ModelType", "SentencePieceModel", "TokenType", "WireFormatError"]


class WireFormatError(ValueError):
    """Bytes that are not a SentencePiece model. The message names the fault, not the file."""


class TokenType(IntEnum):
    """A token's type: `SentencePiece.Type`; GGUF's `tokenizer.ggml.token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """`TrainerSpec.ModelType`."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types; this format does not use 3 and 4 (groups)


@dataclass(frozen=True)
class SentencePieceModel:
    """The fields of a `ModelProto` that decide ids and text; the defaults are the format's own."""

    pieces: tuple[bytes, ...]  # UTF-8, as in the file; one per token, like `scores` and `types`
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int = ModelType.UNIGRAM
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    unk_piece: bytes = b"<unk>"
    bos_piece: bytes = b"<s>"
    eos_piece: bytes = b"</s>"
    pad_piece: bytes = b"<pad>"
    normalizer: bytes = b""  # the name its trainer gave it: identity, nmt_nfkc, ...
    has_charsmap: bool = False  # the normaliser rewrites characters
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    has_denormalizer: bool = False

    @classmethod
    def from_bytes(cls, data: bytes) -> SentencePieceModel:
        """Read a model file. Raises WireFormatError where the bytes are truncated or of another format."""
        pieces: list[bytes] = []
        scores: list[float] = []
        types: list[int] = []
        settings: dict[str, Any] = {}
        for number, value in _fields(data):
            if number == 1:
                piece, score, kind = _piece(_message(value, "pieces"))
                pieces.append(piece)
                scores.append(score)
                types.append(kind)
            elif number == 2:
                settings |= _settings(_message(value, "trainer_spec"), _TRAINER)
            elif number == 3:
                settings |= _settings(_message(value, "normalizer_spec"), _NORMALIZER)
            elif number == 5:
                charsmap = _settings(_message(value, "denormalizer_spec"), _NORMALIZER).get("has_charsmap", False)
                settings["has_denormalizer"] = charsmap
        if not pieces:
            raise WireFormatError("it holds no pieces")
        return cls(tuple(pieces), tuple(scores), tuple(types), **settings)

    def to_bytes(self) -> bytes:
        """The model as a file that the `sentencepiece` library loads, without a charsmap."""
        out = bytearray()
        pack = struct.Struct("<f").pack
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            body = b"\x0a%b%b\x15%b\x18%c" % (_varint(len(piece)), piece, pack(score), kind)
            out += b"\x0a%b%b" % (_varint(len(body)), body)
        for tag, fields in ((b"\x12", _TRAINER), (b"\x1a", _NORMALIZER)):
            body = b"".join(
                _field(number, getattr(self, name)) for number, name in fields.items() if name != "has_charsmap"
            )
            out += b"%b%b%b" % (tag, _varint(len(body)), body)
        return bytes(out)


# Field number -> attribute. The type of the attribute's default is the field's: integer, flag or string.
_TRAINER = {
    3: "model_type",
    24: "treat_whitespace_as_suffix",
    35: "byte_fallback",
    45: "unk_piece",
    46: "bos_piece",
    47: "eos_piece",
    48: "pad_piece",
}
_NORMALIZER = {
    1: "normalizer",
    2: "has_charsmap",
    3: "add_dummy_prefix",
    4: "remove_extra_whitespaces",
    5: "escape_whitespaces",
}


def _piece(data: bytes) -> tuple[bytes, float, int]:
    piece, score, kind = b"", 0.0, int(TokenType.NORMAL)
    for number, value in _fields(data):
        if number == 1:
            piece = _message(value, "piece")
        elif number == 2:
            if not isinstance(value, float):
                raise WireFormatError("a piece's score is not a float")
            score = value
        elif number == 3:
            if not isinstance(value, int):
                raise WireFormatError("a piece's type is not a number")
            kind = value
    return piece, score, kind


def _settings(data: bytes, names: dict[int, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for number, value in _fields(data):
        name = names.get(number)
        if name is None:
            continue
        default = getattr(SentencePieceModel, name)
        if name == "has_charsmap":
            settings[name] = len(_message(value, name)) > 0
        elif isinstance(default, bytes):
            settings[name] = _message(value, name)
        elif isinstance(value, int):
            settings[name] = bool(value) if isinstance(default, bool) else value
        else:
            raise WireFormatError(f"{name} is not a number")
    return settings


def _message(value: int | float | bytes, name: str) -> bytes:
    if not isinstance(value, bytes):
        raise WireFormatError(f"{name} is not a string of bytes")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """Number and value of each field of a message: a varint as `int`, fixed32 as `float`, others as `bytes`."""
    offset, end = 0, len(data)
    while offset < end:
        tag, offset = _read_varint(data, offset)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise WireFormatError(f"field number 0 before byte {offset}")
        if wire == _VARINT:
            value, offset = _read_varint(data, offset)
            yield number, value
            continue
        if wire == _LENGTH:
            length, offset = _read_varint(data, offset)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise WireFormatError(f"wire type {wire} before byte {offset}")
        if length > end - offset:
            raise WireFormatError(f"{length} bytes announced where {end - offset} are left: truncated")
        chunk = data[offset : offset + length]
        offset += length
        if wire == _FIXED32:
            yield number, struct.unpack("<f", chunk)[0]
        else:
            yield number, chunk


def _read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """A base-128 number, low group first, and the position after it; at most ten bytes, for 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            raise WireFormatError("it ends inside a number: truncated")
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise WireFormatError(f"a number longer than 64 bits before byte {offset}")


def _varint(value: int) -> bytes:
    if value < 0x80:
        return b"%c" % value
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(int(value))
