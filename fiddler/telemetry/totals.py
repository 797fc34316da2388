"""Totals since the start for a server: choices of each expert, bytes and seconds by kind of work and place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from fiddler.telemetry.expert_counts import ExpertCounts

__all__ = ["Total", "Totals"]


class Total(NamedTuple):
    """All work of one kind in one place. `seconds`: of host threads only; what a GPU does later has none."""

    seconds: float
    nbytes: int


class Totals(ExpertCounts):
    """A `Recorder` whose totals any thread may read while others record."""

    def __init__(self, layers: int, experts: int) -> None:
        """layers, experts: of the model, L and E."""
        super().__init__(layers, experts)
        self._lock = threading.Lock()
        self._work: dict[tuple[str, str], Total] = {}

    @contextmanager
    def span(self, name: str, nbytes: int) -> Iterator[None]:
        """Implements `Recorder.span`."""
        begun = time.perf_counter()
        yield
        self.did(name, begun, time.perf_counter(), nbytes)

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Implements `Recorder.did`."""
        self._add(name, "cpu", ended - begun, nbytes)

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Implements `Recorder.queued`; counts the bytes."""
        self._add(name, "gpu", 0.0, nbytes)
        return nullcontext()

    @property
    def work(self) -> dict[tuple[str, str], Total]:
        """Totals by kind of work ("experts", "dense", "copy", ...) and place ("cpu" or "gpu")."""
        with self._lock:
            return dict(self._work)

    def _add(self, name: str, place: str, seconds: float, nbytes: int) -> None:
        with self._lock:
            before = self._work.get((name, place), Total(0.0, 0))
            self._work[name, place] = Total(before.seconds + seconds, before.nbytes + nbytes)
