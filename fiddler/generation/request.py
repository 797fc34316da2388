"""`Request`, what to generate and how, and its checks against a model before anything is computed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fiddler.errors import RequestError
from fiddler.models.config import Config
from fiddler.sampling.sampler import Sampling
from fiddler.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fiddler.runtime.kv_cache import KVCache
    from fiddler.sampling.constraint import Constraint

__all__ = ["CheckedPrompt", "Request", "checked_ids", "checked_request"]


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt that fits the context, and what follows from it.

    after_prompt: called with the sequence when it holds just the prompt. reuse: resume the sequence computed last, from
    its common prefix with the prompt.
    """

    ids: Sequence[int]
    limit: int  # of tokens to generate
    stop: Sequence[str] = ()  # strings that end the text
    reuse: bool = False
    after_prompt: Callable[[KVCache], None] = lambda sequence: None


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; the fields are arguments of `Engine.start`, which says what each means.

    prompt: text, or token ids. max_tokens None: until an end token or the end of the context.
    """

    prompt: str | Sequence[int]
    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None


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


def _remedy(config: Config, context: int) -> str:
    maximum = config.context_length
    return f"or raise --ctx, up to {maximum}" if context < maximum else "the model was trained with no more"
