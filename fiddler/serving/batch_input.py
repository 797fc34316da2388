"""Prompts in a file of JSON lines: each line's fields, checked before any of them is run. Knows no model.

A line is an object: `id` (a string or a number, each once), `prompt` or `messages` (role and content each, as OpenAI's
chat), and what the defaults would say otherwise: `max_tokens`, `stop`, `ignore_eos` and the fields of `Sampling` by
their names. A field that is null counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from fiddler.errors import RequestError, quoted
from fiddler.sampling.sampler import Sampling

__all__ = ["Defaults", "Id", "Job", "JobFile", "Message", "as_id", "parse_object"]

Id = str | int | float
Message = dict[str, str]

_SAMPLING = [field.name for field in fields(Sampling)]
_FIELDS = ["id", "prompt", "messages", "max_tokens", "stop", "ignore_eos", *_SAMPLING]


@dataclass(frozen=True)
class Defaults:
    """What a line leaves open. `max_tokens` None: until the end, or as far as the context goes."""

    sampling: Sampling
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Job:
    """A line: text to continue, or messages to answer."""

    id: Id
    prompt: str | tuple[Message, ...]
    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    ignore_eos: bool


class JobFile:
    """The file; `ids` are all there are, checked. Its lines are read again as they are run, one at a time."""

    def __init__(self, path: Path, defaults: Defaults) -> None:
        """Check every line.

        Raises RequestError, with the number of the line, for the first that is not right; for a file that cannot be
        read or holds nothing.
        """
        self.path = path
        self._defaults = defaults
        self.ids: dict[Id, int] = {}  # and their lines' numbers
        for number, job in self._lines():
            if job.id in self.ids:
                self._refuse(number, f"the id {quoted(job.id)} is that of line {self.ids[job.id]}; give each its own")
            self.ids[job.id] = number
        if not self.ids:
            raise RequestError(f'{path}: holds no prompt; give lines as {{"id": 1, "prompt": "Once upon a time"}}')

    def jobs(self, done: Collection[Id]) -> Iterator[Job]:
        """Those whose ids are not `done`, in their order."""
        for number, job in self._lines():
            if self.ids.get(job.id) != number:
                self._refuse(number, "was changed after it was checked; run the command again")
            if job.id not in done:
                yield job

    def _lines(self) -> Iterator[tuple[int, Job]]:
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise RequestError(f"{self.path}: is no regular file, which is read twice; give a file of JSON lines")
            with self.path.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                    if text.strip():
                        try:
                            job = _job(parse_object(text), self._defaults)
                        except RequestError as error:
                            self._refuse(number, str(error))
                        yield number, job
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be read: {error.strerror}; give a file of JSON lines") from None

    def _refuse(self, number: int, message: str) -> NoReturn:
        raise RequestError(f"{self.path}, line {number}: {message}") from None


def parse_object(line: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises RequestError for anything else."""
    try:
        found = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise RequestError("is not UTF-8; save the file as UTF-8") from None
    except RecursionError:
        raise RequestError("is nested too deeply; give an object of plain fields") from None
    except ValueError as error:
        raise RequestError(f"is not JSON ({' '.join(str(error).split())[:80]}); give one object a line") from None
    if not isinstance(found, dict):
        raise RequestError(f"is a {type(found).__name__}, not an object; give an id and a prompt by name")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def as_id(value: object) -> Id:
    """Raises RequestError for what is no id."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RequestError(f"the id is {quoted(value)}; give a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"the id is {value}; give a finite number, or a string")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise RequestError(f"the id {quoted(value)} is no text that UTF-8 can hold; give another")
    return value


def _job(line: dict[str, Any], defaults: Defaults) -> Job:
    unknown = next((name for name in line if name not in _FIELDS), None)
    if unknown is not None:
        raise RequestError(f"unknown field {quoted(unknown)}; known are {', '.join(_FIELDS)}")
    given = {name: value for name, value in line.items() if value is not None}
    if "id" not in given:
        raise RequestError("has no id; give a string or a number")
    identity = as_id(given["id"])
    limit = given.get("max_tokens", defaults.max_tokens)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < -1):
        raise RequestError(f"max_tokens is {quoted(limit)}; give a whole number, -1 for no limit")
    ignore_eos = given.get("ignore_eos", defaults.ignore_eos)
    if not isinstance(ignore_eos, bool):
        raise RequestError(f"ignore_eos is {quoted(ignore_eos)}; give true or false")
    return Job(
        identity,
        _prompt(given),
        _sampling(given, defaults.sampling, identity),
        None if limit == -1 else limit,
        _stop(given["stop"]) if "stop" in given else defaults.stop,
        ignore_eos,
    )


def _prompt(given: dict[str, Any]) -> str | tuple[Message, ...]:
    if ("prompt" in given) == ("messages" in given):
        raise RequestError("give either a prompt or messages")
    if "prompt" in given:
        prompt = given["prompt"]
        if not isinstance(prompt, str):
            raise RequestError(f"the prompt is {quoted(prompt)}; give a string")
        return prompt
    messages = given["messages"]
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"messages are {quoted(messages)}; give a list of objects with role and content")
    for message in messages:
        if not (
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and all(isinstance(part, str) for part in message.values())
        ):
            raise RequestError(f"a message is {quoted(message)}; give an object with role and content, both strings")
    return tuple(messages)


def _stop(value: object) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop is {quoted(value)}; give a string or a list of them, none empty")
    return tuple(texts)


def _sampling(given: dict[str, Any], defaults: Sampling, identity: Id) -> Sampling:
    """The line's own fields over the defaults, whose seed becomes the line's: it depends on nothing but them both."""
    own: dict[str, Any] = {}
    for name in _SAMPLING:
        if name not in given:
            continue
        value, usual = given[name], getattr(defaults, name)
        if isinstance(value, bool) and not isinstance(usual, bool):
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
    """JSON's keys are texts: ids of tokens."""
    if not isinstance(value, dict):
        return value
    return {int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key: b for key, b in value.items()}


def _seed(seed: int, identity: Id) -> int:
    """The first eight bytes of SHA-256 of "seed:id", the id as JSON."""
    digest = hashlib.sha256(f"{seed}:{json.dumps(identity)}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
