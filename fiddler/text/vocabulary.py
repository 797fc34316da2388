"""The tokenizer keys of a GGUF's metadata, checked once: `TokenTable`.

Defaults, missing keys and unusual token names follow llama.cpp's `llama` tokenizer (`llama_vocab::impl::load` in
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp). Knows the keys and their valid values; neither
how text is split into tokens, nor the file that holds the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fiddler.errors import FileFormatError, quoted
from fiddler.text.sentencepiece_model import TokenType

__all__ = ["IN_TEXT_IDS", "LARGEST_VOCABULARY", "LONGEST_TOKEN", "PREPEND_SCHEME", "SPACE", "TokenTable"]

PREPEND_SCHEME = "fiddler.tokenizer.prepend_scheme"
"""A metadata key of our own, for a tokenizer with the prefix rule of `Metaspace` in Hugging Face's `tokenizers`
library: no space goes before a text that begins with one ("always"), nor anywhere but at the very start ("first").
"""

IN_TEXT_IDS = "fiddler.tokenizer.in_text_ids"
"""A metadata key of our own: ids of user-defined tokens that are part of the text around them, as in SentencePiece. The
space before a text also goes before such a token, and none goes after it; llama.cpp has it the other way round.
"""

LARGEST_VOCABULARY = 1 << 20
"""Maximum number of tokens, four times the largest vocabularies."""

LONGEST_TOKEN = 1 << 16
"""Maximum length of a token [characters]."""

_PREFIX = "tokenizer.ggml."

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


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary in the metadata; `texts`, `scores` and `types` have one entry per token, by id."""

    texts: list[str]  # as in the file: "▁" is a space in an ordinary token; no text yields the token ""
    scores: list[float]
    types: list[int]  # `TokenType`
    bos_id: int
    eos_id: int
    end_ids: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    prepend_scheme: str | None  # see PREPEND_SCHEME; None is llama.cpp's rule
    in_text_ids: frozenset[int]  # see IN_TEXT_IDS
    chat_template: str | None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> TokenTable:
        """Check and gather the tokenizer keys. Raises FileFormatError for one missing, malformed or out of range."""
        model = metadata.get(f"{_PREFIX}model")
        if not isinstance(model, str) or model != "llama":
            raise FileFormatError(
                f"tokenizer.ggml.model is {quoted(model)}; "
                "only 'llama' (SentencePiece BPE), which Mixtral uses, is supported"
            )
        texts = _texts(metadata)
        count = len(texts)
        scores = _numbers(metadata, "scores", count, "if")
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise FileFormatError(f"tokenizer.ggml.scores holds {scores[bad]} for token {bad}; convert the model again")
        types = _numbers(metadata, "token_type", count, "i")
        invalid = np.flatnonzero((types < 0) | (types > max(TokenType)))
        if invalid.size:
            raise FileFormatError(
                f"tokenizer.ggml.token_type is {types[invalid[0]]} for token {invalid[0]}; "
                f"it must lie between 0 and {max(TokenType)}"
            )
        kinds: list[int] = np.where(types == 0, int(TokenType.UNUSED), types).tolist()
        bos_id, eos_id = _id(metadata, "bos_token_id", count, 1), _id(metadata, "eos_token_id", count, 2)
        end_ids = {eos_id}
        end_ids |= {_id(metadata, key, count) for key in ("eot_token_id", "eom_token_id") if _PREFIX + key in metadata}
        for index, text in enumerate(texts):
            if text in _END_NAMES:
                end_ids.add(index)
                kinds[index] = TokenType.CONTROL
        template = metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise FileFormatError(f"tokenizer.chat_template is {quoted(template)}; it must be one string")
        scheme = metadata.get(PREPEND_SCHEME)
        if scheme is not None and not (isinstance(scheme, str) and scheme in ("always", "first")):
            raise FileFormatError(f"{PREPEND_SCHEME} is {quoted(scheme)}; it must be 'always' or 'first'")
        return cls(
            texts=texts,
            scores=scores.astype(np.float32).tolist(),
            types=kinds,
            bos_id=bos_id,
            eos_id=eos_id,
            end_ids=frozenset(end_ids),
            add_bos=_flag(metadata, "add_bos_token", True),
            add_eos=_flag(metadata, "add_eos_token", False),
            add_space_prefix=_flag(metadata, "add_space_prefix", True),
            prepend_scheme=scheme if isinstance(scheme, str) else None,
            in_text_ids=_in_text_ids(metadata, kinds),
            chat_template=template,
        )


def _texts(metadata: Mapping[str, object]) -> list[str]:
    texts = metadata.get(f"{_PREFIX}tokens")
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


def _numbers(metadata: Mapping[str, object], key: str, count: int, kinds: str) -> NDArray[Any]:
    """The array under `key`: [count], with a dtype of one of numpy's `kinds`."""
    value = metadata.get(f"{_PREFIX}{key}")
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in kinds:
        raise FileFormatError(f"tokenizer.ggml.{key} is {quoted(value)}; it must be an array of one number a token")
    if len(value) != count:
        raise FileFormatError(
            f"tokenizer.ggml.{key} has {len(value)} entries for {count} tokens; convert the model again"
        )
    return value


def _id(metadata: Mapping[str, object], key: str, count: int, default: int | None = None) -> int:
    value = metadata.get(f"{_PREFIX}{key}", default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise FileFormatError(
            f"tokenizer.ggml.{key} is {quoted(value)}; it must be the id of one of the {count} tokens"
        )
    return value


def _in_text_ids(metadata: Mapping[str, object], kinds: list[int]) -> frozenset[int]:
    value = metadata.get(IN_TEXT_IDS)
    if value is None:
        return frozenset()
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        ids = frozenset(int(index) for index in value)
        if all(0 <= index < len(kinds) and kinds[index] == TokenType.USER_DEFINED for index in ids):
            return ids
    raise FileFormatError(f"{IN_TEXT_IDS} is {quoted(value)}; it must be an array of ids of user-defined tokens")


def _flag(metadata: Mapping[str, object], key: str, default: bool) -> bool:
    value = metadata.get(f"{_PREFIX}{key}", default)
    if not isinstance(value, bool):
        raise FileFormatError(f"tokenizer.ggml.{key} is {quoted(value)}; it must be true or false")
    return value


SPACE = "▁"  # U+2581, a space inside an ordinary token
