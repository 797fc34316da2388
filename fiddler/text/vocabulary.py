"""The tokenizer keys of a GGUF's metadata, checked once: `TokenTable`.

Defaults, missing keys and unusual token names follow llama.cpp's `llama` and `gpt2` tokenizers
(`llama_vocab::impl::load` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp). Knows the keys and
their valid values; neither how text is split into tokens, nor the file that holds the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiddler.errors import FileFormatError, quoted
from fiddler.text.byte_level_keys import PREFIX, ByteLevelKeys, flag
from fiddler.text.sentencepiece_model import TokenType

__all__ = [
    "ADDED_TOKEN_IDS",
    "IN_TEXT_IDS",
    "LARGEST_VOCABULARY",
    "LONGEST_TOKEN",
    "PREPEND_SCHEME",
    "SPACE",
    "TokenTable",
]

PREPEND_SCHEME = "fiddler.tokenizer.prepend_scheme"
"""A metadata key of our own, for a tokenizer with the prefix rule of `Metaspace` in Hugging Face's `tokenizers`
library: no space goes before a text that begins with one ("always"), nor anywhere but at the very start ("first").
"""

IN_TEXT_IDS = "fiddler.tokenizer.in_text_ids"
"""A metadata key of our own: ids of user-defined tokens that are part of the text around them, as in SentencePiece. The
space before a text also goes before such a token, and none goes after it; llama.cpp has it the other way round.
"""

ADDED_TOKEN_IDS = {
    option: f"fiddler.tokenizer.{option}_ids" for option in ("lstrip", "rstrip", "single_word", "normalized")
}
"""Metadata keys of our own: ids of control and user-defined tokens with these options of an added token in Hugging
Face's `tokenizers` library. The first two take the white space before or behind along; `single_word` matches between
word boundaries only; `normalized` is looked for after the other tokens, and in the normalised text.
"""

LARGEST_VOCABULARY = 1 << 20
"""Maximum number of tokens, four times the largest vocabularies."""

LONGEST_TOKEN = 1 << 16
"""Maximum length of a token [characters]."""

# Tokens of these names end a generation in llama.cpp, whatever the file says; it also makes them control tokens.
_END_NAMES = frozenset(
    (
        *("</s>", "<eos>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<turn|>", "[e~["),
        *("<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|tool_response>", "<|fim_pad|>"),
        *("<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>"),
        *("<REPO>", "<reponame>", "<|file_sep|>", "<｜end▁of▁sentence｜>"),
    )
)


_ADDED = {TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN}


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary in the metadata; `texts`, `scores` and `types` have one entry per token, by id."""

    model: str  # "llama": SentencePiece's BPE; "gpt2": byte-level BPE
    texts: list[str]  # as in the file: "▁" is a space in an ordinary token; no text yields the token ""
    scores: list[float]  # of "llama"; "gpt2" has merges instead
    types: list[int]  # `TokenType`
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    prepend_scheme: str | None  # see PREPEND_SCHEME; None is llama.cpp's rule
    in_text_ids: frozenset[int]  # see IN_TEXT_IDS
    added_token_ids: Mapping[str, frozenset[int]]  # by option; see ADDED_TOKEN_IDS
    byte_level: ByteLevelKeys | None  # of "gpt2"
    chat_template: str | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> TokenTable:
        """Check and gather the tokenizer keys. Raises FileFormatError for one missing, malformed or out of range."""
        model = metadata.get(f"{PREFIX}model")
        if not isinstance(model, str) or model not in ("llama", "gpt2"):
            raise FileFormatError(
                f"tokenizer.ggml.model is {quoted(model)}; "
                "only 'llama' (SentencePiece's BPE) and 'gpt2' (byte-level BPE) are supported"
            )
        texts = _texts(metadata)
        count = len(texts)
        byte_level = ByteLevelKeys.from_metadata(metadata, LARGEST_VOCABULARY) if model == "gpt2" else None
        scores = _scores(metadata, count) if byte_level is None else []
        types = _numbers(metadata, "token_type", count, "i")
        invalid = np.flatnonzero((types < 0) | (types > max(TokenType)))
        if invalid.size:
            raise FileFormatError(
                f"tokenizer.ggml.token_type is {types[invalid[0]]} for token {invalid[0]}; "
                f"it must lie between 0 and {max(TokenType)}"
            )
        kinds: list[int] = np.where(types == 0, int(TokenType.UNUSED), types).tolist()
        defaults = (1, 2) if byte_level is None else (11, 11)
        bos_id, eos_id = (
            _id(metadata, f"{name}_token_id", count, default)
            for name, default in zip(("bos", "eos"), defaults, strict=True)
        )
        ends = {index for index, text in enumerate(texts) if text in _END_NAMES}
        if byte_level is not None:  # Qwen's has an ordinary token "</s>", which is text, whatever llama.cpp does
            ends = {index for index in ends if kinds[index] != TokenType.NORMAL}
        end_ids = _ends(texts, ends)
        for index in end_ids:
            kinds[index] = TokenType.CONTROL
        keys = (key for key in ("eot_token_id", "eom_token_id") if PREFIX + key in metadata)
        end_ids |= {eos_id, *(_id(metadata, key, count) for key in keys)}
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise FileFormatError(f"tokenizer.chat_template is {quoted(template)}; it must be one string")
        scheme = metadata.get(PREPEND_SCHEME)
        if scheme is not None and not (isinstance(scheme, str) and scheme in ("always", "first")):
            raise FileFormatError(f"{PREPEND_SCHEME} is {quoted(scheme)}; it must be 'always' or 'first'")
        return cls(
            model=model,
            texts=texts,
            scores=scores,
            types=kinds,
            bos_id=bos_id,
            eos_id=eos_id,
            end_ids=frozenset(end_ids),
            add_bos=flag(metadata, f"{PREFIX}add_bos_token", byte_level is None or byte_level.adds_bos),
            add_eos=flag(metadata, f"{PREFIX}add_eos_token", False),
            add_space_prefix=flag(metadata, f"{PREFIX}add_space_prefix", True) and byte_level is None,
            prepend_scheme=scheme if isinstance(scheme, str) else None,
            in_text_ids=_ids(metadata, IN_TEXT_IDS, kinds, {TokenType.USER_DEFINED}, "user-defined tokens"),
            added_token_ids={
                option: _ids(metadata, key, kinds, _ADDED, "control and user-defined tokens")
                for option, key in ADDED_TOKEN_IDS.items()
            },
            byte_level=byte_level,
            chat_template=template,
        )


def _texts(metadata: Mapping[str, object]) -> list[str]:
    texts = metadata.get(f"{PREFIX}tokens")
    if not isinstance(texts, list) or not texts:
        raise FileFormatError(f"tokenizer.ggml.tokens is {quoted(texts)}; it must be a list of at least one string")
    if len(texts) > LARGEST_VOCABULARY:
        raise FileFormatError(
            f"tokenizer.ggml.tokens holds {len(texts)} tokens; at most {LARGEST_VOCABULARY} are accepted"
        )
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise FileFormatError(f"tokenizer.ggml.tokens holds {quoted(text)} for token {index}; it must be a string")
        if len(text) > LONGEST_TOKEN:
            raise FileFormatError(
                f"tokenizer.ggml.tokens: token {index} is {len(text)} characters long; "
                f"at most {LONGEST_TOKEN} are accepted"
            )
    return texts


def _scores(metadata: Mapping[str, object], count: int) -> list[float]:
    scores = _numbers(metadata, "scores", count, "if")
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise FileFormatError(f"tokenizer.ggml.scores holds {scores[bad]} for token {bad}; convert the model again")
    narrow: list[float] = scores.astype(np.float32).tolist()
    return narrow


def _ends(texts: list[str], named: set[int]) -> set[int]:
    """`named`, the tokens that end a generation by their names, less one that ends one message of several."""
    names = {texts[index] for index in named}
    if names & {"<|call|>", "<|calls|>"} and names & {"<|return|>", "<|flush|>"}:
        return {index for index in named if texts[index] != "<|end|>"}
    return named


def _numbers(metadata: Mapping[str, object], key: str, count: int, kinds: str) -> NDArray[Any]:
    """The array under `key`: [count], with a dtype of one of numpy's `kinds`."""
    value = metadata.get(f"{PREFIX}{key}")
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
        raise FileFormatError(f"tokenizer.ggml.{key} is {quoted(value)}; it must be an array of one number a token")
    if len(value) != count:
        raise FileFormatError(
            f"tokenizer.ggml.{key} has {len(value)} entries for {count} tokens; convert the model again"
        )
    return value


def _id(metadata: Mapping[str, object], key: str, count: int, default: int | None = None) -> int:
    value = metadata.get(f"{PREFIX}{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise FileFormatError(
            f"tokenizer.ggml.{key} is {quoted(value)}; it must be the id of one of the {count} tokens"
        )
    return value


def _ids(
    metadata: Mapping[str, object], key: str, kinds: list[int], allowed: set[TokenType], called: str
) -> frozenset[int]:
    """The ids of `allowed` types under a key of our own; none where it is absent."""
    value = metadata.get(key)
    if value is None:
        return frozenset()
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        ids = frozenset(value.tolist())
        if all(0 <= index < len(kinds) and kinds[index] in allowed for index in ids):
            return ids
    raise FileFormatError(f"{key} is {quoted(value)}; it must be an array of ids of {called}")


SPACE = "▁"  # U+2581, a space inside an ordinary token
