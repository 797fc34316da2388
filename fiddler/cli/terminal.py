"""The terminal of a chat: messages typed in one line or several, Ctrl-C, and text that cannot steer the terminal.

Ctrl-C means what the moment makes it. While something is typed, it drops that, and says how to leave where nothing
was. While an answer comes, it sets a flag that is looked at between two tokens, since an exception in the middle of
one could leave torch or the GPU half way; pressed again when that takes longer than a second, it does what it did
before the chat. Knows no model.
"""

from __future__ import annotations

import io
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Self

from fiddler.cli.options import say

__all__ = ["StoppedError", "Terminal", "Typed", "harmless"]

_BLOCK = '"""'
_IMPATIENCE = 1.0  # seconds, within which a second Ctrl-C is the same one
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class StoppedError(Exception):
    """Ctrl-C, where it may end what was going on."""


@dataclass(frozen=True)
class Typed:
    """What was typed. `one_line`: neither in a block nor continued, so that it may be a command."""

    text: str
    one_line: bool


class Terminal:
    """Within a `with` block, Ctrl-C is handled as said above."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: Callable[[int, FrameType | None], Any] | None = None
        self._reading = False
        self._nothing_typed = True
        self._interrupted: float | None = None
        self._line_buffer: Callable[[], str] = str
        with suppress(ImportError):  # not every Python has it; `input` then reads plain lines
            import readline

            self._line_buffer = readline.get_line_buffer

    def __enter__(self) -> Self:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is typed may be no UTF-8
        before = signal.getsignal(signal.SIGINT)
        if before is not None and not isinstance(before, int):  # not where it is ignored, or not Python's
            self._before = before
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @property
    def interrupted(self) -> bool:
        """Whether there was a Ctrl-C since something was last read."""
        return self._interrupted is not None

    def check(self) -> None:
        """Raises StoppedError where there was."""
        if self.interrupted:
            raise StoppedError

    def read(self) -> Typed | None:
        """The next message that is not empty; None where there is no more, by Ctrl-D.

        A line that ends with a backslash goes on in the next one; what stands between two marks of three double quotes
        is one message, as it is.
        """
        while True:
            try:
                typed = self._message()
            except EOFError:
                say("")
                return None
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit leaves)" if self._nothing_typed else "")
                continue
            self._interrupted = None
            if typed.text.strip():
                return typed

    def _message(self) -> Typed:
        self._nothing_typed = True
        line = self._line("> ")
        if line.lstrip().startswith(_BLOCK):
            text = line.lstrip().removeprefix(_BLOCK)
            while not text.rstrip().endswith(_BLOCK):
                text += "\n" + self._line(". ")
            return Typed(text.rstrip().removesuffix(_BLOCK).strip("\n"), one_line=False)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line(". "))
        return Typed("\n".join(lines), one_line=len(lines) == 1 and "\n" not in line)

    def _line(self, prompt: str) -> str:
        try:
            self._reading = True
            line = input(prompt)
        finally:
            self._reading = False
        self._nothing_typed = False
        return line

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._reading:
            self._nothing_typed = self._nothing_typed and not self._line_buffer()
            raise KeyboardInterrupt
        if self._interrupted is None:
            self._interrupted = self._clock()
        elif self._clock() - self._interrupted > _IMPATIENCE and self._before is not None:
            self._before(number, frame)


def harmless(text: str) -> str:
    r"""`text` with control characters but line breaks and tabs written out, as `\x1b`: no terminal obeys it."""
    return text.translate(_ESCAPES)
