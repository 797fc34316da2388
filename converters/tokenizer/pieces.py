"""The tokens of a tokenizer file of either format (`Pieces`), and the reader of SentencePiece's `tokenizer.model`.

Knows which SentencePiece models llama.cpp's `llama` tokenizer reproduces; does not know what Hugging Face adds to
them (`vocabulary`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fiddler.errors import CheckpointError, quoted
from fiddler.input_file import read_regular
from fiddler.text.byte_level_keys import ByteLevelKeys
from fiddler.text.sentencepiece_model import ModelType, SentencePieceModel, TokenType, WireFormatError
from fiddler.text.vocabulary import LARGEST_VOCABULARY

__all__ = ["BYTE_NAMES", "SPACE", "Piece", "Pieces", "read_tokenizer_model"]

SPACE = "▁"  # U+2581, a space inside a piece
BYTE_NAMES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_LARGEST_FILE = 256 << 20  # bytes; 32,000 pieces make half a megabyte


class Piece(NamedTuple):
    """One token; ordinary tokens of higher score are merged first."""

    text: str
    score: float  # 0 in byte-level BPE
    type: TokenType


@dataclass(frozen=True)
class Pieces:
    """The tokens of one file by id, and its rule for a space before a text."""

    source: str  # the file's name, for messages
    by_id: dict[int, Piece]  # ids may have gaps
    names: dict[str, str]  # "bos", "eos", "unk", "pad" -> the token's text; only those that the file names
    add_space_prefix: bool
    prepend_scheme: str | None = None  # "always", "first": `Metaspace`'s rule; see fiddler.text.vocabulary
    byte_level: ByteLevelKeys | None = None  # of byte-level BPE
    in_text_ids: frozenset[int] = frozenset()  # user-defined tokens inside a text; see fiddler.text.vocabulary


def read_tokenizer_model(path: Path) -> Pieces:
    """Read a SentencePiece BPE model with byte fallback.

    Raises CheckpointError if the file is damaged or does what llama.cpp's `llama` tokenizer cannot: another algorithm,
    a normaliser, another treatment of white space.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; download it again") from None
    try:
        model = SentencePieceModel.from_bytes(data)
    except WireFormatError as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}; download it again") from None
    _check_supported(path, model)
    by_id = {index: _piece(path, model, index) for index in range(len(model.pieces))}
    missing = set(BYTE_NAMES) - {piece.text for piece in by_id.values() if piece.type == TokenType.BYTE}
    if missing:
        raise CheckpointError(f"{path} lacks the byte token {min(missing)}; download it again")
    names = {
        "bos": model.bos_piece,
        "eos": model.eos_piece,
        "unk": model.unk_piece,
        "pad": model.pad_piece,
    }
    return Pieces(
        source=str(path),
        by_id=by_id,
        names={name: piece.decode("utf-8", "replace") for name, piece in names.items()},
        add_space_prefix=model.add_dummy_prefix,
        in_text_ids=frozenset(index for index, piece in by_id.items() if piece.type == TokenType.USER_DEFINED),
    )


def _check_supported(path: Path, model: SentencePieceModel) -> None:
    if len(model.pieces) > LARGEST_VOCABULARY:
        raise CheckpointError(f"{path} holds {len(model.pieces)} pieces; at most {LARGEST_VOCABULARY} are accepted")
    if model.model_type != ModelType.BPE:
        known = model.model_type in set(ModelType)
        name = ModelType(model.model_type).name.lower() if known else str(model.model_type)
        raise CheckpointError(f"{path} is a SentencePiece {name} model; only BPE models can be converted")
    if not model.byte_fallback:
        raise CheckpointError(f"{path} has no byte fallback; only models trained with byte_fallback can be converted")
    normalizer = quoted(model.normalizer.decode("utf-8", "replace"), 40)
    for unsupported, reason in (
        (model.has_charsmap, f"its normalizer {normalizer} rewrites characters"),
        (model.has_denormalizer, "it has a denormalizer"),
        (model.remove_extra_whitespaces, "remove_extra_whitespaces is set"),
        (not model.escape_whitespaces, "escape_whitespaces is off"),
        (model.treat_whitespace_as_suffix, "treat_whitespace_as_suffix is set"),
    ):
        if unsupported:
            raise CheckpointError(
                f"{path} cannot be converted: {reason}, which llama.cpp's tokenizer does not do; "
                "only the identity normalizer is supported"
            )


def _piece(path: Path, model: SentencePieceModel, index: int) -> Piece:
    raw, score, kind = model.pieces[index], model.scores[index], model.types[index]
    if kind not in set(TokenType):
        raise CheckpointError(f"{path}: piece {index} is of the unknown type {kind}; download it again")
    if not math.isfinite(score):
        raise CheckpointError(f"{path}: piece {index} has the score {score}; download it again")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: piece {index} is not UTF-8: {quoted(raw, 60)}; download it again") from None
    if kind == TokenType.BYTE and text not in BYTE_NAMES:
        raise CheckpointError(f"{path}: piece {index} is a byte token called {quoted(text, 40)}; download it again")
    if kind == TokenType.USER_DEFINED:
        text = text.replace(SPACE, " ")  # llama.cpp matches these in the text as typed
    return Piece(text, score, TokenType(kind))
