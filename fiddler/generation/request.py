"""Validates a generation request: options, prompts and numbers of tokens, before anything is computed. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from fiddler.errors import RequestError
from fiddler.models.config import Config
from fiddler.text.tokenizer import Tokenizer

__all__ = ["check_options", "checked_ids", "checked_request"]


def checked_ids(ids: Sequence[int], config: Config, context: int) -> list[int]:
    """`ids` as ints. Raises RequestError when one is outside the vocabulary or there are more than `context`."""
    ids = [int(token) for token in ids]
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise RequestError(f"token id {bad} is outside the vocabulary of {config.vocab_size}")
    if len(ids) > context:
        raise RequestError(
            f"{len(ids)} tokens exceed the context of {context}; shorten them ({_remedy(config, context)})"
        )
    return ids


def checked_request(
    prompt: str | Sequence[int],
    max_tokens: int | None,
    stop: Sequence[str],
    tokenizer: Tokenizer,
    config: Config,
    context: int,
) -> tuple[list[int], int]:
    """The prompt's ids and the most tokens that may follow. Raises RequestError for a request that makes no sense."""
    ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos) if isinstance(prompt, str) else prompt
    ids = checked_ids(ids, config, context)
    if not ids:
        raise RequestError("the prompt is empty and this model adds no BOS token; give some text")
    if max_tokens is not None and max_tokens < 0:
        raise RequestError(f"max_tokens is {max_tokens}; give 0 or more, or none for no limit")
    available = context - len(ids)
    if max_tokens is not None and max_tokens > available:
        raise RequestError(
            f"{len(ids)} prompt tokens and {max_tokens} new ones exceed the context of {context}; "
            f"ask for at most {available} ({_remedy(config, context)})"
        )
    if available == 0 and max_tokens is None:
        raise RequestError(f"{len(ids)} prompt tokens fill the context of {context} ({_remedy(config, context)})")
    if any(not text for text in stop):
        raise RequestError("a stop string is empty; give at least one character")
    return ids, available if max_tokens is None else max_tokens


def check_options(device: str, precision: str, missing: str, context: int, gpu_experts: int | None) -> None:
    """Raises RequestError for options of `load` that make no sense."""
    if precision not in ("fast", "exact"):
        raise RequestError(f"precision is {precision!r}; give 'fast' or 'exact'")
    if context < 1:
        raise RequestError(f"context is {context}; give at least 1")
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"device is {device!r}; give 'auto', 'cpu' or 'cuda'")
    if missing not in ("auto", "cpu", "stream"):
        raise RequestError(f"missing is {missing!r}; give 'auto', 'cpu' or 'stream'")
    if gpu_experts is not None and gpu_experts < 0:
        raise RequestError(f"gpu_experts is {gpu_experts}; give 0 or more")


def _remedy(config: Config, context: int) -> str:
    maximum = config.context_length
    return f"or raise --ctx, up to {maximum}" if context < maximum else "the model was trained with no more"
