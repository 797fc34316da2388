"""Mixtral's own tokenizer: its merges as transformers derives them, and our tokenizer of its model file."""

from __future__ import annotations

from functools import cache

from fiddler.text.sentencepiece_model import SentencePieceModel
from fiddler.text.tokenizer import Tokenizer
from oracles.texts import REAL_MODEL
from oracles.vocabularies import metadata


@cache
def real_merges(by_score):
    """Mixtral's merges as transformers derives them, by score (version 4) or by id (version 5)."""
    from transformers.convert_slow_tokenizer import generate_merges

    model = SentencePieceModel.from_bytes(REAL_MODEL.read_bytes())
    names = [piece.decode() for piece in model.pieces]
    vocab = {name: index for index, name in enumerate(names)}
    return vocab, generate_merges(vocab, dict(zip(names, model.scores, strict=True)) if by_score else None)


def real_metadata():
    model = SentencePieceModel.from_bytes(REAL_MODEL.read_bytes())
    return metadata(
        [(piece.decode(), *rest) for piece, *rest in zip(model.pieces, model.scores, model.types, strict=True)]
    )


REAL = Tokenizer.from_metadata(real_metadata())
