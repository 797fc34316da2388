"""The door to the process that renders chat templates: starts it, asks it, ends it. Knows no messages, no tokens."""

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

__all__ = ["Limits", "TemplateProcess"]

_PATIENCE = 30  # times the seconds of computing, and seconds besides, until a machine that busy is given up
_START = (
    "import fiddler.text.template_sandbox as it, sys; it.main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))"
)


@dataclass(frozen=True)
class Limits:
    """What rendering a template once may take: seconds of computing, bytes of memory, characters of text."""

    seconds: float = 2.0
    memory: int = 256 << 20
    characters: int = 4 << 20


class TemplateProcess:
    """Renders templates in a process that is started when first needed, and again when a template ended it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text that the Jinja template `source` makes of `variables`, which are what JSON can say.

        Raises RequestError where the template refuses them by `raise_exception`, FileFormatError where it is
        malformed, fails, does what the sandbox forbids or takes more than the limits, ResourceError where no process
        can be started; all in one line.
        """
        request = json.dumps({"source": source, "variables": dict(variables)}).encode() + b"\n"
        process = self._running()
        try:
            line = _exchange(process, request, time.monotonic() + _PATIENCE * (self._limits.seconds + 1))
        except BaseException:
            self.close()  # else its answer would be taken for the next one's
            raise
        if not line.endswith(b"\n"):
            raise FileFormatError(f"the chat template {self._death(process)}")
        answer = json.loads(line)
        if "text" in answer:
            text: str = answer["text"]
            return text
        self._check_goes_on(answer["error"])
        raise self._refusal(answer["error"], answer["message"])

    def close(self) -> None:
        """End the process; a later `render` starts another."""
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            limits = self._limits
            arguments = [str(limits.seconds), str(limits.memory), str(limits.characters)]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _START, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is not for it
                )
            except OSError as error:
                raise ResourceError(f"cannot start {sys.executable} to render the chat template: {error}") from None
            self._end = weakref.finalize(self, _stop, self._process)
        return self._process

    def _check_goes_on(self, kind: str) -> None:
        """After what may have left the process short of memory, the next request gets another one."""
        if kind in ("memory", "depth", "length"):
            self.close()

    def _refusal(self, kind: str, message: str) -> FileFormatError | RequestError:
        told, limits = quoted(message, 200), self._limits
        if kind == "raised":
            return RequestError(f"the model's chat template refuses these messages: {told}")
        what = {
            "forbidden": f"tries what is forbidden to it: {told}",
            "syntax": f"is malformed: {told}",
            "length": f"writes more than {limits.characters} characters",
            "memory": f"asks for more than {limits.memory >> 20} MiB of memory",
            "depth": "is nested too deeply",
        }.get(kind, f"fails: {told}")
        return FileFormatError(f"the chat template {what}")

    def _death(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # not in a hurry to end where time was up
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
    """The answer's line; without its end where the process ended first, or time was up."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    found: list[bytes] = []
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([process.stdout], [], [], left)[0]:
            break
        part = os.read(process.stdout.fileno(), 1 << 16)
        found.append(part)
        if not part or part.endswith(b"\n"):
            break
    return b"".join(found)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End it, unless it has ended, and leave nothing behind."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                continue  # of a request that it did not read any more
    process.kill()
    process.wait()
