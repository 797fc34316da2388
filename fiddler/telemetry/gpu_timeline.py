"""When a GPU did its queued work, on the clock of the CPU's threads. Knows streams and events in them; no models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fiddler.telemetry.timeline import Span, Tracer

__all__ = ["GpuTracer"]

_TRIES = 5  # to read both clocks at the same moment


class GpuTracer(Tracer):
    """A `Tracer` that also records a GPU's work, by events before and after it, which cost microseconds each."""

    wants_queued = True

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event, int, int]] = []
        self._reference: tuple[torch.cuda.Event, float] | None = None  # an event, and when the GPU reached it

    def clear(self) -> None:
        """Implements `Meter.clear`; compares the clocks again: they drift apart."""
        self._settle()
        if self._reference is not None:
            self._reference = _reference_event()
        super().clear()

    @contextmanager
    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> Iterator[None]:
        """Implements `Recorder.queued`."""
        if self._reference is None:
            self._reference = _reference_event()
        assert stream is None or isinstance(stream, torch.cuda.Stream)
        target = torch.cuda.current_stream() if stream is None else stream
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record(target)
        yield
        ended.record(target)
        self._pending.append((name, begun, ended, nbytes, target.stream_id))

    def spans(self) -> list[Span]:
        """Implements `Tracer.spans`; waits for the GPU."""
        self._settle()
        return super().spans()

    def _settle(self) -> None:
        """Wait for the pending work and record its times."""
        if self._reference is None:
            return
        reference, reached = self._reference
        for name, begun, ended, nbytes, stream in self._pending:
            ended.synchronize()
            begin, end = (reached + reference.elapsed_time(event) / 1e3 for event in (begun, ended))
            self._spans.append(Span(name, begin, end, nbytes, "GPU", stream))
        self._pending.clear()


def _reference_event() -> tuple[torch.cuda.Event, float]:
    """An event in a stream of its own, and the time.perf_counter at which the GPU reached it."""
    stream, best = torch.cuda.Stream(), None
    for _ in range(_TRIES):
        event = torch.cuda.Event(enable_timing=True)
        before = time.perf_counter()
        event.record(stream)
        event.synchronize()
        after = time.perf_counter()
        if best is None or after - before < best[0]:
            best = after - before, event, (before + after) / 2
    assert best is not None
    return best[1], best[2]
