"""`Request`, what to generate and how, and its checks against a model before anything is computed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf
from operator import index
from typing import TYPE_CHECKING

from fiddler.errors import RequestError, flag_of, quoted
from fiddler.models.config import Config
from fiddler.sampling.sampler import Sampling
from fiddler.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from fiddler.runtime.kv_cache import KVCache
    from fiddler.sampling.constraint import Constraint

__all__ = [
    "CheckedPrompt",
    "Request",
    "check_request",
    "check_text",
    "checked_ids",
    "checked_request",
    "checked_sampling",
    "longest_text",
    "token_ids",
    "whole_number",
]

_PRIORITIES = ("interactive", "batch")
_MOST_STOPS = 1024  # each is searched in every piece of text
_MOST_IDS = 1 << 22  # longer than any context, and looked through in half a second


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt that fits the context, and what follows from it.

    after_prompt: called with the sequence when it holds just the prompt. reuse: resume what past sequences
    have of the prompt's beginning. interactive: see `Request.priority`. named_tokens: see `Request`.
    """

    ids: Sequence[int]
    limit: int  # of tokens to generate
    stop: Sequence[str] = ()  # strings that end the text
    reuse: bool = True
    interactive: bool = True
    after_prompt: Callable[[KVCache], None] = lambda sequence: None
    named_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    prompt: text, which gets a BOS where the model's metadata say so, or token ids, taken as they are. max_tokens: None
    goes on until an end token or the end of the context. stop: a string that ends the text, not included, or several.
    ignore_eos: end tokens are never chosen. constraint: a language that the text must follow; the text ends where that
    is complete. special: names of control tokens in a text prompt, as `<s>`, are read as these tokens; only for text
    that no stranger wrote. reuse: what earlier sequences have in common with the prompt's beginning is not computed
    again, which may change roundings; without it a request with temperature 0 or a seed gives the same bits each time.
    priority: "interactive" requests, for whose tokens someone waits, come before those of a "batch".
    named_tokens: ids of control tokens whose names stand in the generated text, which shows no other control tokens: a
    parser of tool calls looks for them.
    Raises RequestError for a value of another type, or an empty stop string.
    """

    prompt: str | Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    constraint: Constraint | None = None
    special: bool = False
    reuse: bool = True
    priority: str = "interactive"
    named_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", token_ids("the prompt", self.prompt))
        if not isinstance(self.sampling, Sampling):
            raise RequestError(f"sampling is {quoted(self.sampling)}; give a fiddler.Sampling")
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", whole_number("max_tokens", self.max_tokens))
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        for name in ("ignore_eos", "special", "reuse"):
            flag_of(name, getattr(self, name))
        if not isinstance(self.named_tokens, frozenset):
            raise RequestError(f"named_tokens is {quoted(self.named_tokens)}; give a frozenset of token ids")
        if not isinstance(self.priority, str) or self.priority not in _PRIORITIES:
            raise RequestError(f"priority is {quoted(self.priority)}; give {' or '.join(_PRIORITIES)}")


def whole_number(name: str, value: object) -> int:
    """`value` as an int. Raises RequestError for anything that is not a whole number by its type, as 1.0 or "1"."""
    try:
        if not isinstance(value, bool):
            return index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise RequestError(f"{name} is {quoted(value)}; it must be a whole number")


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """`value` as token ids. Raises RequestError for anything but whole numbers in a row, as a list or a tensor [T].

    More than `_MOST_IDS` are refused before they are looked through: a `range` may have any number.
    """
    remedy = "give a text or token ids" if name == "the prompt" else "give token ids, as tokenizer.encode returns them"
    if isinstance(value, str | bytes | bytearray | memoryview):
        raise RequestError(f"{name} is {type(value).__name__} {quoted(value)}; {remedy}")
    ids = value.tolist() if hasattr(value, "tolist") else value  # of tensors and arrays
    if not isinstance(ids, Sequence):
        raise RequestError(f"{name} is {quoted(value)}; {remedy}")
    if _longer(ids, _MOST_IDS):
        raise RequestError(f"{name} has more than {_MOST_IDS} token ids; give fewer")
    for token in ids:
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            several = "; several texts are for `batch`" if isinstance(token, str) else ""
            messages = "; messages are for fiddler.Chat" if isinstance(token, dict) else ""
            raise RequestError(f"{name} has {quoted(token)} for a token id; {remedy}{several}{messages}")
    try:
        return tuple(map(index, ids))
    except TypeError:  # an array of several numbers has an `__index__`, too
        raise RequestError(f"{name} is {quoted(value)}; {remedy}") from None


def _longer(values: Sequence[object], most: int) -> bool:
    try:
        return len(values) > most
    except OverflowError:  # a range beyond 2**63
        return True


def _stop_strings(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
        raise RequestError(f"stop is {quoted(stop)}; give a text or several")
    try:
        texts = tuple(islice(texts, _MOST_STOPS + 1))
    except TypeError:  # an array or a tensor of one number
        raise RequestError(f"stop is {quoted(stop)}; give a text or several") from None
    if len(texts) > _MOST_STOPS:
        raise RequestError(f"stop has more than {_MOST_STOPS} texts; give fewer")
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"stop has {quoted(text)}; give a text or several")
        if not text:
            raise RequestError("a stop string is empty; give at least one character")
    return texts


def check_request(request: object) -> None:
    """Raise RequestError unless `request` is a `Request`."""
    if not isinstance(request, Request):
        raise RequestError(f"the request is {quoted(request)}; give a fiddler.Request")


def checked_ids(ids: Sequence[int], config: Config, context: int) -> list[int]:
    """`ids` as a list. Raises RequestError when one is outside the vocabulary or there are more than `context`."""
    ids = list(ids)
    bad = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if bad is not None:
        raise RequestError(f"token id {quoted(bad)} is outside the vocabulary of {config.vocab_size}")
    if len(ids) > context:
        raise RequestError(
            f"{len(ids)} tokens exceed the context of {context}; shorten them ({_remedy(config, context)})"
        )
    return ids


def checked_request(request: Request, tokenizer: Tokenizer, config: Config, context: int) -> tuple[list[int], int]:
    """The prompt's ids and the most tokens that may follow. Raises RequestError for a request that makes no sense."""
    ids, max_tokens = request.prompt, request.max_tokens
    if isinstance(ids, str):
        check_text("the prompt", ids, tokenizer, config, context)
        ids = tokenizer.encode(ids, add_bos=tokenizer.add_bos, parse_special=request.special)
    ids = checked_ids(ids, config, context)
    if not ids:
        raise RequestError("the prompt is empty and this model adds no BOS token; give some text")
    if max_tokens is not None and max_tokens < 0:
        raise RequestError(f"max_tokens is {quoted(max_tokens)}; give 0 or more, or none for no limit")
    available = context - len(ids)
    if max_tokens is not None and max_tokens > available:
        raise RequestError(
            f"{len(ids)} prompt tokens and {quoted(max_tokens)} new ones exceed the context of {context}; "
            f"ask for at most {available} ({_remedy(config, context)})"
        )
    if available == 0 and max_tokens is None:
        raise RequestError(f"{len(ids)} prompt tokens fill the context of {context} ({_remedy(config, context)})")
    return ids, available if max_tokens is None else max_tokens


def check_text(kind: str, text: str, tokenizer: Tokenizer, config: Config, context: int) -> None:
    """Raise RequestError for a text that no `context` tokens hold, before it is encoded: that takes some hundred times
    its memory. kind: "the prompt".
    """
    if len(text) > context:  # shorter ones need no look at the vocabulary
        limit, remedy = longest_text(tokenizer, config, context)
        if len(text) > limit:
            raise RequestError(f"{kind} has {len(text)} characters, more than {limit}; {remedy}")


def checked_sampling(request: Request, tokenizer: Tokenizer, config: Config) -> Sampling:
    """The request's sampling, end tokens banned where it ignores them. Raises RequestError for an unknown token."""
    sampling = request.sampling
    bad = next((token for token in sampling.logit_bias if token >= config.vocab_size), None)
    if bad is not None:
        raise RequestError(f"logit_bias is for token {quoted(bad)}, outside the vocabulary of {config.vocab_size}")
    if not request.ignore_eos:
        return sampling
    return replace(sampling, logit_bias={**sampling.logit_bias, **dict.fromkeys(tokenizer.end_ids, -inf)})


def longest_text(tokenizer: Tokenizer, config: Config, context: int) -> tuple[int, str]:
    """Bytes of the longest text that `context` tokens can hold, and the remedy for a longer one."""
    remedy = f"the context of {context} tokens holds no more; shorten the text ({_remedy(config, context)})"
    return context * tokenizer.longest_token, remedy


def _remedy(config: Config, context: int) -> str:
    maximum = config.context_length
    return f"or raise --ctx, up to {maximum}" if context < maximum else "the model was trained with no more"
