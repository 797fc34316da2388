"""Strings that are hard on a tokenizer, and folders holding one. Uses nothing of fiddler: its oracles are libraries."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import mistral_common

REAL_MODEL = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
"""Mixtral's own SentencePiece model."""

CONFIG = {"model_type": "mixtral", "vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}

_WORDS = """the quick brown fox jumps over the lazy dog tokenization internationalisation Donaudampfschiff
    def return lambda self.__init__ !=-1 x**2 {"key": [1,2.5e-3]} <|im_start|> </div> http://example.org/?q=1&r=%20
    быстрая коричневая лиса Καλημέρα κόσμε مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก 你好世界 こんにちは世界
    안녕하세요 გამარჯობა բարեւ 𐎠𐎡𐎢 ሰላም naïve café Ångström ﬁnance ǅ İstanbul ß ẞ ½ ² Ⅷ ① ｆｕｌｌ Zürich ñandú"""
_PIECES = (
    *_WORDS.split(),
    *("😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "é", "ạ̈̃", "\u200b", "\u200d", "\ufeff", "\u00a0", "\u3000", "\u2028"),
    *("▁", "▁▁", "\ufffd", "\uffff", "\U0010ffff", "\U000e0001", "\u0378", "‮abc", "\ue000"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "[INST]", "<s", "s>", "<pad>", "<|im_end|>"),
    *("\0", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85", "\r\n", "\n\n\n", "\t\t", "\v", "\f"),
    *("aaaaaaaaaaaaa", "=" * 21, "-" * 50, "ababababab", "....", "!!!???", "0123456789", "1" * 33, "____"),
)
_BLOCKS = (0x00, 0xA0, 0x370, 0x400, 0x590, 0x600, 0x900, 0xE00, 0x1100, 0x3040, 0x4E00, 0xAC00, 0x1F300)


@cache
def texts(count: int = 5000) -> tuple[str, ...]:
    """Valid Unicode: single characters of every block, runs of spaces, random sentences; the same in every run."""
    source = random.Random(20261101)
    strings = ["", *_PIECES, *(" " * n for n in range(1, 70)), *("\n" * n for n in range(1, 20))]
    strings += [f"{a}{b}" for a in _PIECES for b in ("<s>", " ", "x", "\0")]
    for start in range(0, 0x110000, 0x200):
        code = start + source.randrange(0x200)
        if not 0xD800 <= code < 0xE000:
            strings.append(chr(code) + source.choice(("", " ", "a")))
    while len(strings) < count:
        words = [_word(source) for _ in range(source.randint(1, 12))]
        strings.append(source.choice((" ", "", "  ", "\n", "\t ")).join(words) + " " * source.randrange(3))
    return tuple(strings)


def _word(source: random.Random) -> str:
    kind = source.randrange(8)
    if kind < 5:
        return source.choice(_PIECES)
    if kind == 5:
        return " " * source.randint(1, 20)
    if kind == 6:
        return "".join(chr(source.randint(0x20, 0x7E)) for _ in range(source.randint(1, 12)))
    start = source.choice(_BLOCKS)
    return "".join(chr(start + source.randrange(0x80)) for _ in range(source.randint(1, 8)))


def write_folder(folder: Path, **files: object) -> Path:
    """Write config.json and `files` into `folder`; a keyword with the ending `_json` names a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ({"config_json": CONFIG} | files).items():
        if isinstance(content, bytes):
            (folder / name.replace("_model", ".model")).write_bytes(content)
        else:
            (folder / f"{name.removesuffix('_json')}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
