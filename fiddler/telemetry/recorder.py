"""Who is told what a step spends its time on. Knows names, seconds and bytes; not what they mean."""

from __future__ import annotations

import threading
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

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Such a piece of work is over: it went on between these times of time.perf_counter."""
        ...

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Surrounds the queueing of such work to a GPU, which does it later, in torch's stream (None: current)."""
        ...


class _Silent:
    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        pass

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        return nullcontext()


SILENT: Recorder = _Silent()
"""Takes note of nothing."""


class Meter:
    """Adds up the bytes of each kind of work, and the seconds of what the thread did that made the meter."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.seconds: dict[str, float] = defaultdict(float)
        self.nbytes: dict[str, int] = defaultdict(int)

    def clear(self) -> None:
        """Forget everything so far."""
        self.seconds.clear()
        self.nbytes.clear()

    @contextmanager
    def span(self, name: str, nbytes: int) -> Iterator[None]:
        """A `Recorder`'s."""
        begun = time.perf_counter()
        yield
        self.did(name, begun, time.perf_counter(), nbytes)

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """A `Recorder`'s."""
        if threading.get_ident() == self._thread:  # what another one does goes on beside it
            self.seconds[name] += ended - begun
        self.nbytes[name] += nbytes

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """A `Recorder`'s."""
        return nullcontext()
