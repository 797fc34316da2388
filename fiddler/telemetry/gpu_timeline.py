"""When a GPU did what it was given, on the clock of what threads do. Knows streams and marks in them; no models."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fiddler.telemetry.timeline import Span, Tracer

__all__ = ["GpuTracer"]

_TRIES = 5  # at one moment's time on both clocks


class GpuTracer(Tracer):
    """A `Tracer` that also keeps what a GPU does: marks before and after it, which cost microseconds each."""

    def __init__(self) -> None:
        super().__init__()
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event, int, int]] = []
        self._same: tuple[torch.cuda.Event, float] | None = None  # a mark, and when the GPU reached it

    def clear(self) -> None:
        """A `Meter`'s; and compare the clocks again, which drift apart."""
        self._settle()
        if self._same is not None:
            self._same = _now()
        super().clear()

    @contextmanager
    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> Iterator[None]:
        """A `Recorder`'s."""
        if self._same is None:
            self._same = _now()
        assert stream is None or isinstance(stream, torch.cuda.Stream)
        on = torch.cuda.current_stream() if stream is None else stream
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun.record(on)
        yield
        ended.record(on)
        self._pending.append((name, begun, ended, nbytes, on.stream_id))

    def spans(self) -> list[Span]:
        """A `Tracer`'s; waits for the GPU."""
        self._settle()
        return super().spans()

    def _settle(self) -> None:
        """Find out when what is pending was done."""
        if self._same is None:
            return
        mark, moment = self._same
        for name, begun, ended, nbytes, stream in self._pending:
            ended.synchronize()
            begin, end = (moment + mark.elapsed_time(event) / 1e3 for event in (begun, ended))
            self._spans.append(Span(name, begin, end, nbytes, "GPU", stream))
        self._pending.clear()


def _now() -> tuple[torch.cuda.Event, float]:
    """A mark in a stream of its own and the moment, as time.perf_counter has it, at which the GPU reached it."""
    stream, best = torch.cuda.Stream(), None
    for _ in range(_TRIES):
        mark = torch.cuda.Event(enable_timing=True)
        before = time.perf_counter()
        mark.record(stream)
        mark.synchronize()
        after = time.perf_counter()
        if best is None or after - before < best[0]:
            best = after - before, mark, (before + after) / 2
    assert best is not None
    return best[1], best[2]
