"""Converts and checks a grammar or a JSON schema in a process with limits: `main`; the parent's side is `compiled`.

The `llguidance` library limits the size of a grammar, but not the time that it takes to find it too large: rules that
double 1,000 times take 10 s, a schema of 15,000 properties 5 s. Some schemas end the process that reads them: version
1.9 panics at an `enum` of -2**63, and beside other values reads past an array.
GBNF: llama.cpp's (https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md), converted. Knows no tokens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import lru_cache

from fiddler.errors import RequestError, ResourceError
from fiddler.sampling.process_limits import end_on_timer, limit_memory
from fiddler.text.python_process import command, environment

__all__ = ["BLANKS", "check", "compiled", "converted", "from_schema", "main", "one_line"]

BLANKS = r"[ ]?|\n{1,2}[ \t]{0,20}"
"""Between the parts of JSON, as in llama.cpp's own grammars: bounded, so that no model writes blanks for ever."""

_SECONDS, _MEMORY = 2.0, 1 << 30  # limits of one grammar: CPU time, memory beyond that at the start [bytes]
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_SMALL = 1 << 15  # a text that is remembered [characters]; large ones of strangers would fill memory
_PATIENCE = 60.0  # wall time [s]: the machine may be busy
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)
_GBNF_PART = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*|\.', re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)
_CONTROL = re.compile(r"[\0-\x1f\x7f]")
_OPERATOR = re.compile(r"[&~]|(?<=-)-")


def compiled(text: str, kind: str) -> str:
    """A grammar or a JSON schema in the library's own form; `kind`: "the grammar", or "the JSON schema".

    Raises RequestError where it is malformed, or takes too much time or memory to read; ResourceError where no process
    can be started. The last small ones are remembered: a process takes 0.1 s, and requests often have the same one.
    """
    return (_remembered if len(text) <= _SMALL else _compiled)(text, kind)


def _compiled(text: str, kind: str) -> str:
    try:
        done = subprocess.run(
            command(__name__, _SECONDS, _MEMORY),
            input=json.dumps([text, kind]).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            start_new_session=True,  # Ctrl-C must not reach it
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RequestError(f"{kind} takes more than {_PATIENCE:g} s to read; give a smaller one") from None
    except OSError as error:
        raise ResourceError(f"cannot start {sys.executable} to read {kind}: {error.strerror}") from None
    if done.returncode == -signal.SIGPROF:
        raise RequestError(f"{kind} takes more than {_SECONDS:g} s of computing to read; give a smaller one")
    if -done.returncode in _FAULTS:
        raise RequestError(f"{kind} cannot be used: the library that reads it crashes; give another one")
    if done.returncode < 0:
        raise RequestError(f"{kind} takes more than {_MEMORY >> 20} MiB of memory to read; give a smaller one")
    if done.returncode > 0:
        raise ResourceError(f"{kind} was not read: its process ended with exit code {done.returncode}")
    answer = json.loads(done.stdout)
    if "refused" in answer:
        raise RequestError(answer["refused"])
    source: str = answer["source"]
    return source


_remembered = lru_cache(maxsize=256)(_compiled)


def main(seconds: float, memory: int) -> None:
    """Read a text and its kind as JSON, print {"source": ...} or {"refused": a sentence}.

    Ends by a signal where it takes more than `seconds` of CPU time, or `memory` [bytes] beyond that at its start.
    """
    end_on_timer()
    import llguidance  # noqa: F401  # before the limits

    limit_memory(memory)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    text, kind = json.load(sys.stdin.buffer)
    try:
        answer = {"source": from_schema(text) if kind == "the JSON schema" else converted(text)}
        check(answer["source"], kind)
    except RequestError as error:
        answer = {"refused": str(error)}
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the library's language; no Exception, and has no public name
            raise
        answer = {"refused": f"{kind} cannot be used: the library that reads it fails; give another one"}
    with os.fdopen(1, "wb") as answers:
        answers.write(json.dumps(answer).encode())


def check(source: str, kind: str) -> None:
    """Raise RequestError, which names the `kind`, unless the library can use a grammar in its own form."""
    import llguidance

    reason = llguidance.LLMatcher.validate_grammar(source)
    if reason and not reason.startswith("WARNING"):
        raise RequestError(f"{kind} cannot be used: {one_line(reason)}")


def from_schema(text: str) -> str:
    """A JSON schema in the library's own form. Raises RequestError where it cannot be read. Has no limits of its own;
    see `compiled`.
    """
    import llguidance

    try:
        return llguidance.LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_flexible": True, "whitespace_pattern": BLANKS}
        )
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be read: {one_line(error)}") from None


def converted(text: str) -> str:
    """A grammar in the library's own form. Raises RequestError where it cannot be read. Has no limits of its own."""
    import llguidance

    try:
        if _GBNF_RULE.search(text):
            return llguidance.grammar_from("gbnf", _GBNF_PART.sub(_convertible, text))
        return llguidance.grammar_from("lark", text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be read: {one_line(error)}") from None


def _convertible(match: re.Match[str]) -> str:
    """A literal, class, comment or dot of GBNF, rewritten so that llguidance's converter preserves its meaning.

    The converter copies classes into a regular expression, where `&&`, `~~` and `--` are operators and a dot matches no
    line break, and it drops leading zeros of escapes.
    """
    part = match[0]
    if part == ".":
        return r"[\x00-" + chr(0x10FFFF) + "]"
    if part.startswith("#"):
        return part
    part = _CONTROL.sub(lambda one: f"\\x{ord(one[0]):02x}", part)
    if part.startswith("["):
        part = _OPERATOR.sub(lambda one: f"\\x{ord(one[0]):02x}", part)
    return _ESCAPE.sub(_character, part)


def _character(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2] or escape[3]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
        raise ValueError(f"{escape[0]} is no character")
    return f"\\x{code:02x}" if code < 0x80 else chr(code)


def one_line(reason: object) -> str:
    """The library's reason as one line of at most 200 characters."""
    text = " ".join(str(reason).split())
    return text if len(text) <= 200 else text[:197] + "..."
