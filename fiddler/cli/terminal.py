"""The terminal of a chat: reads messages of one or several lines, handles Ctrl-C, escapes control characters.

While the user types, Ctrl-C drops the input, or prints how to leave if there is none. While an answer comes, Ctrl-C
sets a flag that is checked between two tokens: an exception in the middle of a token could leave torch or the GPU half
way. If that takes longer than a second, a further Ctrl-C calls the handler from before the chat. Knows no model.
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
_FORCE_AFTER = 1.0  # [s]; a second Ctrl-C within it has no effect
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class StoppedError(Exception):
    """Ctrl-C was pressed: the model stops reading the message."""


@dataclass(frozen=True)
class Typed:
    """A typed message. `one_line`: neither in a block nor continued, so it may be a command."""

    text: str
    one_line: bool


class Terminal:
    """Reads messages; within a `with` block, handles Ctrl-C as the module describes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._previous_handler: Callable[[int, FrameType | None], Any] | None = None
        self._reading = False
        self._nothing_typed = True
        self._interrupted: float | None = None
        self._line_buffer: Callable[[], str] = str
        with suppress(ImportError):  # not every Python has it; `input` then reads plain lines
            import readline

            self._line_buffer = readline.get_line_buffer

    def __enter__(self) -> Self:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # typed bytes may not be UTF-8
        handler = signal.getsignal(signal.SIGINT)
        if handler is not None and not isinstance(handler, int):  # a Python handler: not SIG_IGN, SIG_DFL or one of C
            self._previous_handler = handler
            signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed since the last message was read."""
        return self._interrupted is not None

    def check(self) -> None:
        """Raises StoppedError if Ctrl-C was pressed since then."""
        if self.interrupted:
            raise StoppedError

    def read(self) -> Typed | None:
        """The next message that is not empty; None at the end of input (Ctrl-D).

        A line that ends with a backslash continues on the next one; text between two marks of three double quotes is
        one message, unchanged.
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
        elif self._clock() - self._interrupted > _FORCE_AFTER and self._previous_handler is not None:
            self._previous_handler(number, frame)


def harmless(text: str) -> str:
    r"""`text` with control characters, but not line breaks and tabs, written out as `\x1b`: no terminal obeys them."""
    return text.translate(_ESCAPES)
