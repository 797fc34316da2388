"""Small byte-level BPE tokenizers, trained here by the `tokenizers` library, as it and a folder hold them."""

from __future__ import annotations

import json
from functools import cache

import gguf
import numpy as np
from tokenizers import Tokenizer as FastTokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fiddler.files.gguf_file import GgufFile
from fiddler.text.pre_tokenizers import PRE_TOKENIZERS
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.tokenizer import Tokenizer
from oracles.texts import texts

# Pre-tokenizers as the models' tokenizer.json files have them: name in GGUF -> steps.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{}|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex=False, prefix=False):
    return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": use_regex}


DIGITS = {"type": "Digits", "individual_digits": True}
CJK = "[一-龥ࠀ-一가-\ud7ff]+"
STEPS = {
    "gpt-2": [byte_level(use_regex=True)],
    "refact": [DIGITS, byte_level(use_regex=True)],
    "dbrx": [split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _END), byte_level()],
    "qwen2": [split(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _END), byte_level()],
    "qwen35": [
        split(
            _CONTRACTIONS
            + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        byte_level(),
    ],
    "gpt-4o": [split((_CASED % "{1,3}").replace("{}", _CONTRACTIONS + "?")), byte_level()],
    "tekken": [split((_CASED % "").replace("{}", "")), byte_level()],
    "deepseek-v3": [
        split(r"\p{N}{1,3}"),
        split("[一-龥\u3040-ゟ゠-ヿ]+"),
        split(
            "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
            "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
        ),
        byte_level(),
    ],
    "deepseek-coder": [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(CJK), DIGITS, byte_level()],
}
STEPS["deepseek-llm"] = [*map(split, PRE_TOKENIZERS["deepseek-llm"].steps[:-1]), DIGITS, byte_level()]


@cache
def _trained(pre, size):
    tokenizer = FastTokenizer(models.BPE())
    steps = {"type": "Sequence", "pretokenizers": STEPS[pre]}
    empty = json.loads(tokenizer.to_str()) | {"pre_tokenizer": steps}
    tokenizer = FastTokenizer.from_str(json.dumps(empty))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer.to_str()


def trained(pre, added=(), nfc=False, size=800, **changes):
    """A tokenizer of the library: `added` tokens, and `changes` to its file's keys or to those of its model."""
    content = json.loads(_trained(pre, size))
    for key, value in changes.items():
        (content if key in content else content["model"])[key] = value
    tokenizer = FastTokenizer.from_str(json.dumps(content))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    for token in added:
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    return tokenizer


def keys_of(pre, /, *added, **more):
    """GGUF keys of a trained vocabulary; `added`: (name, type) from id 800 on; `more` replaces keys, None removes."""
    model = json.loads(_trained(pre, 800))["model"]
    names = sorted(model["vocab"], key=model["vocab"].get)
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*names, *(name for name, _ in added)],
        "token_type": np.array([TokenType.NORMAL] * len(names) + [kind for _, kind in added], np.int32),
        "merges": [" ".join(pair) for pair in model["merges"]],
    } | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}


def through_a_file(vocabulary, path):
    """The tokenizer of a converted vocabulary after its keys were written to a GGUF and read again, and the keys."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.write_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GgufFile.open(path).metadata
    return Tokenizer.from_metadata(metadata), metadata
