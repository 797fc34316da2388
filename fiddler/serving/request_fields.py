"""The fields of a server's requests that say how to generate, from a body's JSON object. Pure; knows no model.

Names are OpenAI's and llama.cpp's server's; where both have one, either does. Null counts as absent, and fields that
are not known here as well: clients send many.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from numbers import Integral
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request
from fiddler.sampling.constraint import Constraint
from fiddler.sampling.sampler import Sampling

__all__ = ["Settings", "constraint_of", "flag", "settings_of", "whole"]

_LIMITS = ("n_predict", "max_completion_tokens", "max_output_tokens", "max_tokens")  # the first that is there counts
_ALIASES = {"repetition_penalty": "repeat_penalty", "typ_p": "typical_p"}
_SAMPLING = {each.name for each in fields(Sampling)} - {"logit_bias", "seed", "n_probs"}
_WHOLE = {each.name for each in fields(Sampling) if each.type == "int"}
_MOST_TEXTS = 128  # of one request: choices, or prompts times choices
_MOST_PROBS, _MOST_BIASES = 128, 4096


@dataclass(frozen=True)
class Settings:
    """How to generate, but for the prompt.

    max_tokens: None for no limit but the context's. biases: of texts and ids as they came, see `logit_biases`. choices:
    texts for each prompt. schema, grammar: a language that the text must follow; at most one of them. priority: see
    `Request`; OpenAI's service tier "flex" is that of a batch.
    """

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool
    reuse: bool
    choices: int
    biases: Sequence[tuple[int | str, float]] = ()
    schema: Any = None
    grammar: str | None = None
    special: bool = False
    priority: str = "interactive"


def settings_of(body: Mapping[str, Any], defaults: Request, token_limit: int | None = None) -> Settings:
    """The settings of a body; `defaults` has those that it omits. token_limit: a larger `max_tokens` is cut to it.

    Raises RequestError, which names the field, for an invalid one.
    """
    values = {_ALIASES.get(name, name): value for name, value in body.items() if value is not None}
    grammar = values.get("grammar") or None
    if grammar is not None and not isinstance(grammar, str):
        raise RequestError(f"grammar is {quoted(grammar)}; give its text")
    schema = None if grammar is not None else _schema(values)
    if flag(values, "post_sampling_probs"):
        raise RequestError("post_sampling_probs is not supported: probabilities are the model's own; leave it out")
    stop = values.get("stop", defaults.stop)
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise RequestError(f"stop is {quoted(stop)}; give a string or a list of them")
    choices = whole(values, "n_cmpl" if "n_cmpl" in values else "n", 1)
    if not 1 <= choices <= _MOST_TEXTS:
        raise RequestError(f"n is {quoted(choices)}; give 1 to {_MOST_TEXTS}")
    return Settings(
        _sampling(values, defaults.sampling),
        _max_tokens(values, defaults.max_tokens, token_limit),
        tuple(text for text in stop if text),
        flag(values, "ignore_eos", defaults.ignore_eos),
        flag(values, "cache_prompt", defaults.reuse),
        choices,
        _biases(values.get("logit_bias", ())),
        schema,
        grammar,
        flag(values, "special", defaults.special),
        _priority(values.get("service_tier")),
    )


def _priority(tier: object) -> str:
    if tier is not None and not isinstance(tier, str):
        raise RequestError(f'service_tier is {quoted(tier)}; give "flex" for a request that may wait, or leave it out')
    return "batch" if tier == "flex" else "interactive"


def constraint_of(settings: Settings) -> Constraint | None:
    """The constraint of `schema` or `grammar`; takes up to some seconds. Raises RequestError for a bad one."""
    if settings.grammar is not None:
        return Constraint.grammar(settings.grammar)
    return None if settings.schema is None else Constraint.json_schema(settings.schema)


def flag(values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """The field `name`, true or false. Raises RequestError for anything else."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {quoted(value)}; give true or false")
    return value


def whole(values: Mapping[str, Any], name: str, default: int) -> int:
    """The field `name`, a whole number, as 1 or 1.0. Raises RequestError for anything else."""
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**64:
        raise RequestError(f"{name} is {quoted(value)}; give a whole number")
    return value


def _max_tokens(values: Mapping[str, Any], default: int | None, largest: int | None) -> int | None:
    name = next((name for name in _LIMITS if name in values), None)
    limit = default if name is None else whole(values, name, -1)
    if limit is not None and limit < -1:
        raise RequestError(f"{name} is {limit}; give 0 or more, or -1 for no limit")
    if limit is None or limit == -1:
        return largest
    return limit if largest is None else min(limit, largest)


def _sampling(values: Mapping[str, Any], defaults: Sampling) -> Sampling:
    own: dict[str, Any] = {}
    for name in _SAMPLING & values.keys():
        value = values[name]
        if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= 2**64):
            raise RequestError(f"{name} is {quoted(value)}; give a number")
        if name in _WHOLE and isinstance(value, float):
            value = whole(values, name, 0)
        own[name] = tuple(value) if isinstance(value, list) else value
    if "seed" in values:
        seed = whole(values, "seed", -1)
        own["seed"] = None if seed == -1 else seed % 2**64
    own["n_probs"] = _probs(values, defaults.n_probs)
    return replace(defaults, **own)


def _probs(values: Mapping[str, Any], default: int) -> int:
    """How many log-probabilities: llama.cpp's `n_probs`; OpenAI's `logprobs`, a number or true with `top_logprobs`."""
    wanted, name = values.get("logprobs"), "n_probs"
    if "n_probs" not in values and wanted is not None:
        if wanted is False:
            return 0
        name = "top_logprobs" if wanted is True else "logprobs"
    count = whole(values, name, 0 if name == "top_logprobs" else default)
    if not 0 <= count <= _MOST_PROBS:
        raise RequestError(f"{name} is {count}; give 0 to {_MOST_PROBS}")
    return max(count, 1) if wanted is True else count


def _biases(value: object) -> list[tuple[int | str, float]]:
    """Biases as an object, {"15043": -1, " Hello": -100}, or as llama.cpp's pairs, [[15043, -1], [" Hello", false]]."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple) or len(pairs) > _MOST_BIASES:
        raise RequestError(f"logit_bias is {quoted(value)}; give an object of at most {_MOST_BIASES} token ids")
    biases: list[tuple[int | str, float]] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RequestError(f"logit_bias has {quoted(pair)}; give a token id and a bias")
        token, bias = pair
        if isinstance(token, str) and isinstance(value, dict) and token.isascii() and token.isdigit():
            token = int(token) if len(token) < 12 else token
        bias = -inf if bias is False else bias
        if isinstance(token, bool) or not isinstance(token, Integral | str):
            raise RequestError(f"logit_bias is for {quoted(token)}; give a token id or a text")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise RequestError(f"logit_bias is {quoted(bias)} for {quoted(token)}; give a number")
        biases.append((token if isinstance(token, str) else int(token), bias))
    return biases


def _schema(values: Mapping[str, Any]) -> Any:
    """The JSON schema that the text must follow; None for none."""
    if "json_schema" in values:
        return _checked_schema(values["json_schema"]) or {"type": "object"}
    form = values.get("response_format")
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object" and isinstance(form, dict):
        return _checked_schema(form["schema"]) if form.get("schema") is not None else {"type": "object"}
    if kind == "json_schema" and isinstance(form, dict):
        wrapped = form.get("json_schema", form)  # the responses API has name and schema beside the type
        if isinstance(wrapped, dict) and wrapped.get("schema") is not None:
            return _checked_schema(wrapped["schema"])
        raise RequestError("response_format has no json_schema with a schema; give one")
    raise RequestError(f"response_format is {quoted(form)}; its type must be text, json_object or json_schema")


def _checked_schema(schema: object) -> Any:
    if isinstance(schema, str):  # llama.cpp's own tests, and clients that send a schema as a text
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise RequestError(f"the JSON schema is {quoted(schema)}; give an object") from None
    if not isinstance(schema, dict | bool):
        raise RequestError(f"the JSON schema is {quoted(schema)}; give an object")
    return schema
