"""Who is told what a step spends its time on. Knows names, seconds and bytes; not what they mean."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, Protocol

__all__ = ["SILENT", "Meter", "Recorder", "Span", "Tracer"]


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


class Span(NamedTuple):
    """A piece of work on the timeline."""

    name: str
    begun: float  # seconds, of time.perf_counter
    ended: float
    nbytes: int
    place: str  # "CPU" or "GPU"
    row: int  # thread or stream


class Tracer(Meter):
    """A `Meter` that also keeps every span, for a timeline."""

    def __init__(self) -> None:
        super().__init__()
        self._spans: list[Span] = []
        self._started = time.perf_counter()

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """A `Recorder`'s."""
        super().did(name, begun, ended, nbytes)
        self._spans.append(Span(name, begun, ended, nbytes, "CPU", threading.get_ident() % 100000))

    def spans(self) -> list[Span]:
        """All that is over, those of a GPU included."""
        return self._spans

    def idle(self, begin: float, end: float) -> float:
        """Seconds between two moments in which no weights were read and the GPU, if there is one, computed nothing.

        Queueing work and waiting for it are no work; but where a GPU has nothing else to do, it is taken to begin when
        the queueing does, so that this is what was idle at least.
        """
        total, reached = 0.0, begin
        for span in sorted(self.spans(), key=lambda span: span.begun):
            if span.place == "GPU" or span.name in _READING:
                total += max(0.0, min(span.begun, end) - reached)
                reached = max(reached, span.ended)
        return total + max(0.0, end - reached)

    def to_chrome(self) -> dict[str, object]:
        """The timeline as chrome://tracing and Perfetto read it ("Trace Event Format", complete events)."""
        places = ["CPU", "GPU"]
        names = [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": place}} for pid, place in enumerate(places)
        ]
        events = [
            {
                "name": span.name,
                "ph": "X",
                "ts": (span.begun - self._started) * 1e6,
                "dur": (span.ended - span.begun) * 1e6,
                "pid": places.index(span.place),
                "tid": span.row,
                "args": {"bytes": span.nbytes},
            }
            for span in self.spans()
        ]
        return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


_READING = ("experts", "dense")  # what threads do that reads weights
