"""Small tokenizer.json files of both kinds that convert, from which fuzzed ones are made."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import Any

from oracles.byte_level import trained

__all__ = ["SMALL", "VOCABULARY"]

VOCABULARY = 512
"""Tokens of a folder's vocabulary; those that its tokenizer lacks are unused."""
_OLDER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
_NEWER = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def _byte_level(pre: str) -> dict[str, Any]:
    """As the `tokenizers` library writes it."""
    return json.loads(trained(pre, size=300).to_str())


def _white_space(normalizer: object, pre_tokenizer: object) -> dict[str, Any]:
    """As Llama 2's and Mixtral's: bytes have tokens of their own, "▁" stands for a space."""
    words = [["▁", "a"], ["a", "b"], ["▁a", "b"]]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcé", *map("".join, words)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    first = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": names[index]} | flags for index in range(3)],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text],
            "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": words,
        },
    }


SMALL = {
    "byte level": cache(partial(_byte_level, "qwen2")),
    "byte level, several steps": cache(partial(_byte_level, "deepseek-v3")),
    "white space, normalizer": cache(partial(_white_space, _OLDER, None)),
    "white space, Metaspace": cache(partial(_white_space, None, _NEWER)),
}
