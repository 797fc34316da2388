"""The process that renders chat templates: jinja2's sandbox, under limits that the operating system enforces.

A template comes with a model file, so it may be hostile, and Jinja bounds neither its filters nor its operators: one
multiplication can allocate 10 GB, one `tojson` of a list that holds itself forty times never ends. So these limits
hold whatever a template computes:

- CPU time, of parsing, compiling and rendering together: an interval timer, whose signal ends the process in the middle
  of any computation;
- memory beyond the size of the process at its start: RLIMIT_AS;
- characters of the result: counted as they come;
- the outside: no files can be opened, written or grown, no processes started (RLIMIT_NOFILE, _FSIZE, _NPROC, _CORE),
  even if a template escapes jinja2's sandbox. That is a second wall, no promise.

In jinja2's sandbox a template cannot change lists and dictionaries, and cannot reach attributes with an underscore or
any attribute of functions and classes; an attempt ends the rendering. Templates have the environment of `transformers`
(`_compile_jinja_template` in transformers/utils/chat_template_utils.py): trimmed blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson` as JSON without HTML, and `generation` blocks, which change no text.

Requests and answers are lines of JSON on standard input and output. Knows no tokenizer and no model; imports none.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import types
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["main"]

_WITHOUT_ATTRIBUTES = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


class _RaisedError(TemplateError):
    """The template called `raise_exception`: it refuses the messages."""


class _TooLongError(Exception):
    """The result has more characters than allowed."""


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox without attributes of functions and classes; forbidden access raises at once."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return not isinstance(obj, _WITHOUT_ATTRIBUTES) and super().is_safe_attribute(obj, attr, value)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"{attribute!r} of a {type(obj).__name__}")


class _Namespace(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *mappings = args
        values = dict(*mappings, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"{name!r} of a namespace")


class _Generation(Extension):
    """`{% generation %}` marks text for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise(message: object) -> NoReturn:
    raise _RaisedError(str(message))


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _Dict:
    """`dict()` and `dict.fromkeys()`, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _json
    environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return environment


def _rendered(source: str, variables: dict[str, Any], characters: int) -> str:
    pieces: list[str] = []
    length = 0
    for piece in _environment().from_string(source).generate(variables):
        length += len(piece)
        if length > characters:
            raise _TooLongError
        pieces.append(piece)
    return "".join(pieces)


def _answer(request: bytes, characters: int) -> bytes:
    """{"text": ...}, or {"error": kind, "message": ...}, as JSON."""
    try:
        fields = json.loads(request)
        return json.dumps({"text": _rendered(fields["source"], fields["variables"], characters)}).encode()
    except _RaisedError as error:
        return _failed("raised", error)
    except SecurityError as error:
        return _failed("forbidden", error)
    except TemplateSyntaxError as error:
        return _failed("syntax", f"line {error.lineno}: {error.message}")
    except _TooLongError:
        return _failed("length", "")
    except MemoryError:
        return _failed("memory", "")
    except RecursionError:
        return _failed("depth", "")
    except Exception as error:  # noqa: BLE001  # a template can raise whatever Python's operators raise
        return _failed("error", f"{type(error).__name__}: {error}")


def _failed(kind: str, message: object) -> bytes:
    return json.dumps({"error": kind, "message": str(message)[:500]}).encode()


def _limit(memory: int) -> None:
    """Limit memory to its present size and `memory` [bytes], and files and processes to none, irrevocably."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # avoids importing pathlib
        address_space = int(file.read().split()[0]) * resource.getpagesize()
    for which, value in (
        (resource.RLIMIT_AS, address_space + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        hard = resource.getrlimit(which)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def main(seconds: float, memory: int, characters: int) -> None:
    """Answer requests `{"source": ..., "variables": {...}}` until standard input ends.

    Limits: `seconds` of CPU time per request, `memory` beyond the present size [bytes], `characters` per result.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
    for template in ("{{ strftime_now('%Y') }}{{ lipsum() | pprint | wordwrap | striptags }}", "{{ none.x.y }}"):
        _answer(
            json.dumps({"source": template, "variables": {}}).encode(), characters
        )  # jinja2's late imports, before the limits
    _limit(memory)
    with os.fdopen(0, "rb") as requests, os.fdopen(1, "wb") as answers:
        for line in requests:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            answer = _answer(line, characters)
            signal.setitimer(signal.ITIMER_PROF, 0)
            answers.write(answer + b"\n")
            answers.flush()
