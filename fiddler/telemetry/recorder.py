"""Receives events of a step: times and bytes of its work, and the experts it chose. Not their meaning."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SILENT", "Meter", "Recorder", "SilentRecorder"]


class Recorder(Protocol):
    """Receives an event for every piece of work, from the code that does it."""

    @property
    def wants_expert_ids(self) -> bool:
        """Whether `chosen` must be called. Where False, a step may save itself the calls."""
        ...

    @property
    def wants_queued(self) -> bool:
        """Whether `queued` must surround all work for a GPU. Where False, compiled code may queue some of it."""
        ...

    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        """Surrounds a piece of work of the kind `name`, which reads `nbytes` of weights."""
        ...

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Records a finished piece of work: it went on from `begun` to `ended`, by time.perf_counter."""
        ...

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Surrounds the queueing of work for a GPU, which does it later, in torch's `stream` (None: current)."""
        ...

    def chosen(self, layer: int, expert_ids: Tensor) -> None:
        """Receives the experts that a layer's router chose: expert_ids int64 [T, K], valid during the call only.

        Called once a layer of each step, whoever computes the experts; several times where the layer's tokens are
        computed in parts. What it raises breaks the step off: its tokens are not appended to their sequences.
        """
        ...


class SilentRecorder:
    """Ignores all events. A recorder of some events inherits from it."""

    wants_expert_ids = False
    wants_queued = False

    def span(self, name: str, nbytes: int) -> AbstractContextManager[None]:
        """Implements `Recorder.span`."""
        return nullcontext()

    def did(self, name: str, begun: float, ended: float, nbytes: int) -> None:
        """Implements `Recorder.did`."""

    def queued(self, name: str, nbytes: int = 0, stream: object = None) -> AbstractContextManager[None]:
        """Implements `Recorder.queued`."""
        return nullcontext()

    def chosen(self, layer: int, expert_ids: Tensor) -> None:
        """Implements `Recorder.chosen`."""


SILENT: Recorder = SilentRecorder()
"""Ignores all events."""


class Meter(SilentRecorder):
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
