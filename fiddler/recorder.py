"""Who is told what a step spends its time on. Knows names, seconds and bytes; not what they mean."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

__all__ = ["SILENT", "Meter", "Recorder", "Tracer"]


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
        started = time.perf_counter()
        yield
        if threading.get_ident() == self._thread:  # what another one does goes on beside it
            self.seconds[name] += time.perf_counter() - started
        self.nbytes[name] += nbytes


class Tracer(Meter):
    """A `Meter` that also keeps every span, for a timeline."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[dict[str, object]] = []
        self._started = time.perf_counter()

    @contextmanager
    def span(self, name: str, nbytes: int) -> Iterator[None]:
        """A `Recorder`'s."""
        started = time.perf_counter()
        with super().span(name, nbytes):
            yield
        ended = time.perf_counter()
        self._events.append(
            {
                "name": name,
                "ph": "X",
                "ts": (started - self._started) * 1e6,
                "dur": (ended - started) * 1e6,
                "pid": 0,
                "tid": threading.get_ident() % 100000,
                "args": {"bytes": nbytes},
            }
        )

    def to_chrome(self) -> dict[str, object]:
        """The timeline as chrome://tracing and Perfetto read it ("Trace Event Format", complete events)."""
        return {"traceEvents": self._events, "displayTimeUnit": "ms"}
