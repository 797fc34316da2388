"""Receives timing events of a step. Knows names, seconds and bytes; not their meaning."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

__all__ = ["SILENT", "Meter", "Recorder"]


class Recorder(Protocol):
    """Receives an event for every piece of work, from the code that does it."""

    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        """Surrounds a piece of work of the kind `name`, which reads `nbytes` of weights."""
        ...

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Records a finished piece of work: it went on from `begun` to `ended`, by time.perf_counter."""
        ...

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Surrounds the queueing of work for a GPU, which does it later, in torch's `stream` (None: current)."""
        ...


class _Silent:
    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        return nullcontext()

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        pass

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        return nullcontext()


SILENT: Recorder = _Silent()
"""Ignores all events."""


class Meter:
    """Adds up the bytes of each kind of work, and the seconds of work of the thread that made the meter."""

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
        """Implements `Recorder.span`."""
        begun = time.perf_counter()
        yield
        self.did(name, begun, time.perf_counter(), nbytes)

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Implements `Recorder.did`."""
        if threading.get_ident() == self._thread:  # the work of other threads overlaps with it
            self.seconds[name] += ended - begun
        self.nbytes[name] += nbytes

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Implements `Recorder.queued`."""
        return nullcontext()
