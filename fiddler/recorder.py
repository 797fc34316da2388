"""Who is told what a step spends its time on. Knows names, seconds and bytes; not what they mean."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

__all__ = ["SILENT", "Meter", "Recorder"]


class Recorder(Protocol):
    """Is told of every piece of work, by the one who does it."""

    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        """Surrounds a piece of work of this kind, which reads so many bytes of weights."""
        ...


class _Silent:
    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()


SILENT: Recorder = _Silent()
"""Takes note of nothing."""


class Meter:
    """Adds up the seconds and the bytes of each kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.nbytes: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget everything so far."""
        self.seconds.clear()
        self.nbytes.clear()

    @contextmanager
    def span(self, name: str, nbytes: int) -> Iterator[None]:
        """A `Recorder`'s."""
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started
        self.nbytes[name] += nbytes
