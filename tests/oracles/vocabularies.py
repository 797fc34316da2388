"""Small vocabularies written by hand: as GGUF keys, as SentencePiece models, as files of `tokenizers` in a folder."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer as FastTokenizer, models, normalizers

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.text.sentencepiece_model import ModelType, SentencePieceModel, TokenType
from fiddler.text.tokenizer import Tokenizer
from oracles.texts import write_folder

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = TokenType


def metadata(pieces, **more):
    """GGUF keys for a list of (text, score, type)."""
    tokens, scores, types = zip(*pieces, strict=True)
    keys = {
        "model": "llama",
        "tokens": list(tokens),
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def small(*pieces, **more):
    """unk, bos, eos and the bytes (ids 3 to 258), then `pieces` from 259 on."""
    first = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)]
    return metadata([*first, *((f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)), *pieces], **more)


LETTERS = tuple((letter, -100 - rank, NORMAL) for rank, letter in enumerate("▁abcx"))  # 259 to 263
SPACE, A, B, C, X = range(259, 264)


def sentencepiece_model(*pieces, **settings):
    """unk, bos, eos, the bytes and "▁ab" (ids 259 to 261), then `pieces` from 262 on."""
    first = [(b"<unk>", UNKNOWN), (b"<s>", CONTROL), (b"</s>", CONTROL), *((name.encode(), BYTE) for name in BYTES)]
    everything = [*first, ("▁".encode(), NORMAL), (b"a", NORMAL), (b"b", NORMAL), *pieces]
    texts_, types = zip(*everything, strict=True)
    usual = {"model_type": ModelType.BPE, "byte_fallback": True, "remove_extra_whitespaces": False}
    scores = tuple(-float(rank) for rank in range(len(texts_)))
    return SentencePieceModel(texts_, scores, types, **(usual | settings)).to_bytes()


def bpe(tokens, merges, **settings):
    """A `tokenizers` BPE over unk, bos, eos, the bytes and `tokens`, with Llama's older normaliser."""
    vocab = {text: index for index, text in enumerate(("<unk>", "<s>", "</s>", *BYTES, *tokens))}
    usual = {"unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True}
    tokenizer = FastTokenizer(models.BPE(vocab=vocab, merges=merges, **(usual | settings)))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


SMALL = bpe(["▁", "a", "b", "c", "ab", "▁a"], [("▁", "a"), ("a", "b")])


def vocabulary(folder, size=32000, **files):
    return read_vocabulary(write_folder(folder, **files), size)


def saved(tokenizer):
    """A `tokenizers` tokenizer as the content of its file."""
    return json.loads(tokenizer.to_str())


def differing(found, oracle, strings):
    """Strings whose ids differ from the oracle's; special tokens are recognised, as the library always does."""
    ours = Tokenizer.from_metadata(found.metadata())
    return [
        text
        for text in strings
        if ours.encode(text, parse_special=True) != oracle.encode(text, add_special_tokens=False).ids
    ]
