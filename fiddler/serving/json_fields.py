"""A request's JSON fields, checked before anything runs, and log-probabilities as JSON. Knows no model and no files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn

from fiddler.errors import RequestError, quoted
from fiddler.generation.request import Request
from fiddler.sampling.constraint import Constraint
from fiddler.sampling.sampler import Sampling
from fiddler.serving.openai_batch import from_openai, is_openai, schema_of
from fiddler.text.messages import Message, checked_messages
from fiddler.text.template_variables import TemplateVariables

if TYPE_CHECKING:
    from fiddler.sampling.logprobs import LogProbs

__all__ = ["Id", "Job", "as_id", "job_of", "parse_object", "probs_of"]


Id = str | int | float

_SAMPLING = [each.name for each in fields(Sampling)]
_OF_TEMPLATES = ["tools", "chat_template_kwargs"]
_FIELDS = [
    "id",
    "prompt",
    "messages",
    *_OF_TEMPLATES,
    "max_tokens",
    "stop",
    "ignore_eos",
    "response_format",
    "cache_prompt",
    *_SAMPLING,
]


@dataclass(frozen=True)
class Job:
    """A checked line: a text to continue; or messages to answer, from which a chat template makes the prompt."""

    id: Id
    request: Request
    messages: tuple[Message, ...] = ()
    variables: TemplateVariables = field(default_factory=TemplateVariables)  # of the template, beside the messages


def parse_object(line: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises RequestError for anything else."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise RequestError("is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise RequestError("is nested too deeply; give an object of plain fields") from None
    except ValueError as error:
        raise RequestError(f"is not JSON ({' '.join(str(error).split())[:80]}); give one object a line") from None
    if not isinstance(value, dict):
        raise RequestError(f"is a {type(value).__name__}, not an object; give an id and a prompt by name")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # as 1e400, which no answer could repeat
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def as_id(value: object) -> Id:
    """`value`, if it is an id. Raises RequestError where it is neither a string nor a finite number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RequestError(f"the id is {quoted(value)}; give a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"the id is {value}; give a finite number, or a string")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise RequestError(f"the id {quoted(value)} is no text that UTF-8 can hold; give another")
    return value


def job_of(line: dict[str, Any], defaults: Request) -> Job:
    """A line's object, in our form or OpenAI's, as a job; `defaults` has the fields that it omits.

    Raises RequestError, which names the field, for an invalid one.
    """
    if is_openai(line):
        line = from_openai(line)
    unknown = next((name for name in line if name not in _FIELDS), None)
    if unknown is not None:
        raise RequestError(f"unknown field {quoted(unknown)}; known are {', '.join(_FIELDS)}")
    values = {name: value for name, value in line.items() if value is not None}
    if "id" not in values:
        raise RequestError("has no id; give a string or a number")
    identity = as_id(values["id"])
    max_tokens = values.get("max_tokens", defaults.max_tokens)
    if max_tokens is not None and (isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < -1):
        raise RequestError(f"max_tokens is {quoted(max_tokens)}; give a whole number, -1 for no limit")
    ignore_eos = _boolean(values, "ignore_eos", defaults.ignore_eos)
    reuse = _boolean(values, "cache_prompt", defaults.reuse)
    prompt, messages = _prompt(values)
    schema = schema_of(values["response_format"]) if "response_format" in values else None
    request = Request(
        prompt,
        _sampling(values, defaults.sampling, identity),
        None if max_tokens == -1 else max_tokens,
        _stop(values["stop"]) if "stop" in values else defaults.stop,
        ignore_eos,
        defaults.constraint if schema is None else Constraint.json_schema(schema),
        reuse=reuse,
    )
    return Job(identity, request, messages, _variables(values))


def _boolean(values: dict[str, Any], name: str, default: bool) -> bool:
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {quoted(value)}; give true or false")
    return value


def _prompt(values: dict[str, Any]) -> tuple[str, tuple[Message, ...]]:
    """The prompt, or else the messages."""
    if ("prompt" in values) == ("messages" in values):
        raise RequestError("give either a prompt or messages")
    if "prompt" in values:
        prompt = values["prompt"]
        if not isinstance(prompt, str):
            raise RequestError(f"the prompt is {quoted(prompt)}; give a string")
        return prompt, ()
    return "", tuple(checked_messages(values["messages"]))


def _variables(values: dict[str, Any]) -> TemplateVariables:
    given = next((name for name in _OF_TEMPLATES if name in values), None)
    if given is not None and "prompt" in values:
        raise RequestError(f"{given} are for messages, which a chat template reads; a prompt has none")
    return TemplateVariables(values.get("tools"), values.get("chat_template_kwargs", {}))


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop is {quoted(value)}; give a string or a list of them, none empty")
    return tuple(texts)


def _sampling(values: dict[str, Any], defaults: Sampling, identity: Id) -> Sampling:
    """The line's own fields over the defaults. A line without a seed derives it from the default seed and its id."""
    own: dict[str, Any] = {}
    for name in _SAMPLING:
        if name not in values:
            continue
        value, default = values[name], getattr(defaults, name)
        if isinstance(value, bool) and not isinstance(default, bool):
            raise RequestError(f"{name} is {json.dumps(value)}; it must be a number")
        if isinstance(value, int) and abs(value) >= 2**64:
            raise RequestError(f"{name} is {quoted(value)}, which is too large")
        own[name] = _biases(value) if name == "logit_bias" else tuple(value) if isinstance(value, list) else value
    if own.get("seed") == -1:
        own["seed"] = None
    elif "seed" not in own and defaults.seed is not None:
        own["seed"] = _seed(defaults.seed, identity)
    return replace(defaults, **own)


def _biases(value: object) -> object:
    """An object with its keys as token ids: JSON has only string keys. Other values and keys stay as they are."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key: b for key, b in value.items()}


def _seed(seed: int, identity: Id) -> int:
    """The first eight bytes of SHA-256 of "seed:id", the id as JSON."""
    digest = hashlib.sha256(f"{seed}:{json.dumps(identity)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def probs_of(pieces: Sequence[bytes], step: LogProbs) -> dict[str, Any]:
    """One step's log-probabilities as JSON, with the keys of `completion_probabilities` of llama.cpp's server.

    `pieces`: each token's text, by id. `bytes` are exact; `token` has U+FFFD for bytes that are not UTF-8.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        piece = pieces[token]
        return {"id": token, "token": piece.decode(errors="replace"), "bytes": [*piece], "logprob": logprob}

    return {**entry(step.token, step.logprob), "top_logprobs": [entry(*pair) for pair in step.top]}
