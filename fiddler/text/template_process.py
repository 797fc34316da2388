"""Starts, queries and ends the process that renders chat templates. Knows no messages, no tokens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fiddler.errors import FileFormatError, RequestError, ResourceError, quoted
from fiddler.text.python_process import command, environment

__all__ = ["Limits", "TemplateProcess"]

_WALL_TIME_FACTOR = 30  # wall time for one answer / (CPU time limit + 1 s): the machine may be busy


@dataclass(frozen=True)
class Limits:
    """Limits of one rendering: CPU time [s], memory [bytes], length of the text [characters]."""

    seconds: float = 2.0
    memory: int = 256 << 20
    characters: int = 4 << 20


class TemplateProcess:
    """Renders templates in a process, started at first use and again after a template ended it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text that the Jinja template `source` renders from `variables`, which JSON must be able to encode.

        Raises RequestError where the template refuses them by `raise_exception`, FileFormatError where it is
        malformed, fails, breaks the sandbox's rules or exceeds the limits, ResourceError where no process can be
        started; all in one line.
        """
        request = json.dumps({"source": source, "variables": dict(variables)}).encode() + b"\n"
        process = self._running()
        try:
            line = _exchange(process, request, time.monotonic() + _WALL_TIME_FACTOR * (self._limits.seconds + 1))
        except BaseException:
            self.close()  # or the next request would read this one's answer
            raise
        if not line.endswith(b"\n"):
            raise FileFormatError(f"the chat template {self._death(process)}")
        answer = json.loads(line)
        if "text" in answer:
            text: str = answer["text"]
            return text
        self._close_if_exhausted(answer["error"])
        raise self._refusal(answer["error"], answer["message"])

    def close(self) -> None:
        """End the process; a later `render` starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            limits = self._limits
            try:
                self._process = subprocess.Popen(
                    command("fiddler.text.template_sandbox", limits.seconds, limits.memory, limits.characters),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment(),
                    start_new_session=True,  # Ctrl-C must not reach it
                )
            except OSError as error:
                raise ResourceError(f"cannot start {sys.executable} to render the chat template: {error}") from None
            self._finalizer = weakref.finalize(self, _stop, self._process)
        return self._process

    def _close_if_exhausted(self, kind: str) -> None:
        """End the process after an error that may leave it short of memory: the next request starts another."""
        if kind in ("memory", "depth", "length"):
            self.close()

    def _refusal(self, kind: str, message: str) -> FileFormatError | RequestError:
        reason, limits = quoted(message, 200), self._limits
        if kind == "raised":
            return RequestError(f"the model's chat template refuses these messages: {reason}")
        failure = {
            "forbidden": f"tries what is forbidden to it: {reason}",
            "syntax": f"is malformed: {reason}",
            "length": f"writes more than {limits.characters} characters",
            "memory": f"asks for more than {limits.memory >> 20} MiB of memory",
            "depth": "is nested too deeply",
        }.get(kind, f"fails: {reason}")
        return FileFormatError(f"the chat template {failure}")

    def _death(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # still running if the deadline passed
            process.wait(timeout=1)
        self.close()
        code = process.returncode
        if code == -signal.SIGPROF:
            return f"takes more than {self._limits.seconds:g} s of computing"
        if code == -signal.SIGKILL:
            return "did not end; its process was killed"
        if code > 0:
            return f"was not rendered: its process ended with exit code {code}; are jinja2 and fiddler importable?"
        return f"ended the process that renders it (signal {-code})"


def _exchange(process: subprocess.Popen[bytes], request: bytes, deadline: float) -> bytes:
    """Send a request. Returns the answer's line, incomplete where the process ended or the deadline passed."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    parts: list[bytes] = []
    while (remaining := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], remaining)[0]:
            break
        part = os.read(process.stdout.fileno(), 1 << 16)
        parts.append(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(parts)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Close the pipes, kill the process and reap it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # the process did not read its last request
    process.kill()
    process.wait()
