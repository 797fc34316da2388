"""A recorder of every span of time, for a timeline. Knows names, seconds and bytes; not their meaning."""

from __future__ import annotations

import threading
import time
from typing import NamedTuple

from fiddler.telemetry.recorder import Meter

__all__ = ["Span", "Tracer"]


class Span(NamedTuple):
    """A piece of work on the timeline."""

    name: str
    begun: float  # seconds, of time.perf_counter
    ended: float
    nbytes: int
    place: str  # "CPU" or "GPU"
    row: int  # thread or stream


class Tracer(Meter):
    """A `Meter` that also records every span, for a timeline."""

    def __init__(self) -> None:
        super().__init__()
        self._spans: list[Span] = []
        self._started = time.perf_counter()

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Implements `Recorder.did`."""
        super().did(name, begun, ended, nbytes)
        self._spans.append(Span(name, begun, ended, nbytes, "CPU", threading.get_ident() % 100000))

    def spans(self) -> list[Span]:
        """All finished spans, those of a GPU included."""
        return self._spans

    def idle(self, begin: float, end: float) -> float:
        """Seconds between two moments in which no weights were read and the GPU, if there is one, computed nothing.

        Queueing work and waiting for it are no work. Yet where a GPU has nothing else to do, its work counts from the
        beginning of its queueing: the result is a lower bound.
        """
        total, reached = 0.0, begin
        for span in sorted(self.spans(), key=lambda span: span.begun):
            if span.place == "GPU" or span.name in _READING:
                total += max(0.0, min(span.begun, end) - reached)
                reached = max(reached, span.ended)
        return total + max(0.0, end - reached)

    def to_chrome(self) -> dict[str, object]:
        """The timeline as chrome://tracing and Perfetto read it ("Trace Event Format", complete events)."""
        devices = ["CPU", "GPU"]
        names = [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}} for pid, name in enumerate(devices)
        ]
        events = [
            {
                "name": span.name,
                "ph": "X",
                "ts": (span.begun - self._started) * 1e6,
                "dur": (span.ended - span.begun) * 1e6,
                "pid": devices.index(span.place),
                "tid": span.row,
                "args": {"bytes": span.nbytes},
            }
            for span in self.spans()
        ]
        return {"traceEvents": [*names, *events], "displayTimeUnit": "ms"}


_READING = ("experts", "dense")  # kinds of work of threads that read weights
