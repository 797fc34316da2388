"""The one thread of a server that computes: it owns a scheduler, takes requests and cancellations, hands out events.

Knows an engine; no connections and no protocols. Whatever other threads ask of it takes effect between two steps.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fiddler.errors import FiddlerError
from fiddler.generation.events import Event, Failed, Finished, Joined, PromptRead, Token
from fiddler.generation.request import Request
from fiddler.serving.batching_delay import StepTimes, batching_delay

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.completion import Completion

__all__ = ["Counters", "Delivery", "InternalError", "Running", "Worker"]


class InternalError(FiddlerError):
    """A step failed for a reason that no request has caused; those that it served have ended."""


class Delivery(NamedTuple):
    """An event of the text `number` among those submitted as `owner`; `at`: time.perf_counter of its step."""

    owner: object
    number: int
    event: Event
    at: float


@dataclass
class Running:
    """A text in the scheduler, as far as it is known: tokens of its prompt, of which some are cached, and new ones."""

    owner: object
    number: int
    prompt: int
    cached: int | None = None  # None while it waits for memory
    read: int = 0
    generated: int = 0


@dataclass
class Counters:
    """Totals since the start, and `largest`, the most tokens that one text had. Written by the worker alone."""

    prompt_tokens: int = 0  # computed
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0
    steps: int = 0
    stepped: int = 0  # sequences, of all steps
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    largest: int = 0


@dataclass
class _Commands:
    """What other threads asked for since the last step."""

    submitted: deque[tuple[object, Sequence[Request]]] = field(default_factory=deque)
    cancelled: set[object] = field(default_factory=set)
    closed: bool = False

    def __bool__(self) -> bool:
        return bool(self.submitted or self.cancelled or self.closed)


class Worker:
    """Runs requests of any threads on a thread of its own, many at once."""

    def __init__(
        self,
        engine: Engine,
        deliver: Callable[[list[Delivery]], None],
        report: Callable[[BaseException], None],
        parallel: int | None = None,
    ) -> None:
        """deliver: called once a step, on the worker's thread, with the events of the step; must return soon.

        report: receives errors that are no request's. parallel: see `Engine.batch`.
        """
        self.counters = Counters()
        self._engine, self._deliver, self._report = engine, deliver, report
        self._scheduler = engine.scheduler(parallel)
        self._running: dict[int, Running] = {}  # by handle
        self._commands, self._changed = _Commands(), threading.Condition()
        self._arriving, self._gathering, self._step_times = 0, False, StepTimes()
        self._thread = threading.Thread(target=self._run, name="fiddler-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, owner: object, requests: Sequence[Request], arriving: int = 0) -> None:
        """Generate a text for each request. The events of text i have the number i; each ends with Finished or Failed.

        owner: any hashable object, by which `cancel` knows them. arriving: see `expect`.
        """
        with self._changed:
            self._commands.submitted.append((owner, requests))
            self._arriving = arriving
            if not (self._gathering and arriving):  # else it would wake only to wait again
                self._changed.notify()

    def expect(self, arriving: int) -> None:
        """Say how many others have arrived and will be submitted: an idle worker waits for them (`batching_delay`)."""
        with self._changed:
            self._arriving = arriving
            if self._gathering and not arriving:
                self._changed.notify()

    def cancel(self, owner: object) -> None:
        """End what was submitted as `owner`, before the next step. It has no more events from then on."""
        with self._changed:
            self._commands.cancelled.add(owner)
            self._changed.notify()

    def close(self) -> None:
        """End all requests and the thread."""
        with self._changed:
            self._commands.closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def running(self) -> list[Running]:
        """The texts that have not ended, in the order of their arrival; waiting ones included."""
        return list(self._running.values())

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                idle = self._scheduler.idle
                with self._changed:
                    while idle and not self._commands:
                        self._changed.wait()
                    commands, self._commands = self._commands, _Commands()
                if commands.closed:
                    return
                self._obey(commands)
                if idle and not self._scheduler.idle:
                    self._gather()
                if not self._commands.closed:
                    self._step()
        finally:
            self._scheduler.close()
            self._running.clear()

    def _gather(self) -> None:
        """Let requests join that arrive together with those that ended the idleness, before all of their first step."""
        first = last = time.perf_counter()
        expected, left = self._expected_seconds(first), 1.0
        while left > 0 and self._scheduler.has_room and not self._scheduler.idle:
            with self._changed:
                self._gathering = True
                while not self._commands.closed:
                    now, arriving = time.perf_counter(), self._arriving > 0
                    left = batching_delay(expected, now - first, now - last, arriving=arriving)
                    if left <= 0 or (self._commands and not arriving):
                        break
                    self._changed.wait(left)
                self._gathering = False
                if self._commands.closed:
                    return
                commands, self._commands = self._commands, _Commands()
            self._obey(commands)
            if commands.submitted:  # their step will take longer, and so may the delay
                last = time.perf_counter()
                expected = self._expected_seconds(first)
                left = batching_delay(expected, last - first, 0.0, arriving=arriving)

    def _expected_seconds(self, begun: float) -> float | None:
        """Of a first step of all texts, which joined at `begun`."""
        self._tell(self._scheduler.take_events(), begun)
        return self._step_times(sum(text.prompt - (text.cached or 0) for text in self._running.values()))

    def _obey(self, commands: _Commands) -> None:
        for owner, requests in commands.submitted:
            if owner not in commands.cancelled:
                self._add(owner, requests)
        if commands.cancelled:
            for handle, text in list(self._running.items()):
                if text.owner in commands.cancelled:
                    self._scheduler.cancel(handle)
                    del self._running[handle]
                    self.counters.cancelled += 1

    def _add(self, owner: object, requests: Sequence[Request]) -> None:
        for index, request in enumerate(requests):
            try:
                generation = self._engine.start(request)
            except FiddlerError as error:
                self._fail(owner, index, error)
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on with other requests
                self._report(error)
                self._fail(owner, index, _internal(error))
                continue
            handle = self._scheduler.add(generation)
            self._running[handle] = Running(owner, index, len(generation.prompt))

    def _fail(self, owner: object, number: int, error: FiddlerError) -> None:
        self.counters.failed += 1
        self._deliver([Delivery(owner, number, Failed(-1, error), time.perf_counter())])

    def _step(self) -> None:
        begun = time.perf_counter()
        self._tell(self._scheduler.take_events(), begun)
        try:
            events = self._scheduler.step()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on with other requests
            self._report(error)
            self._end_all(error)
            return
        seconds, before = time.perf_counter() - begun, self.counters.prompt_tokens
        if self._scheduler.stepped:
            self.counters.steps += 1
            self.counters.stepped += self._scheduler.stepped
        self._tell(events, begun)
        if read := self.counters.prompt_tokens - before:
            others = self._scheduler.stepped - sum(isinstance(event, PromptRead) for event in events)
            self._step_times.took(read + max(0, others), seconds)

    def _tell(self, events: Sequence[Event], begun: float) -> None:
        """Count events and deliver them; `begun`: the beginning of the step, in which requests join."""
        now, deliveries = time.perf_counter(), []
        for event in events:
            text = self._running.get(event.handle)
            if text is not None:
                self._count(text, event)
                at = begun if isinstance(event, Joined) else now
                deliveries.append(Delivery(text.owner, text.number, event, at))
        if deliveries:
            self._deliver(deliveries)

    def _count(self, text: Running, event: Event) -> None:
        counters = self.counters
        if isinstance(event, Joined):
            counters.cached_tokens += event.cached if text.cached is None else 0
            text.cached = event.cached if text.cached is None else text.cached
            text.read = event.cached
        elif isinstance(event, PromptRead):
            counters.prompt_tokens += max(0, event.read - text.read)
            text.read = event.read
        elif isinstance(event, Token):
            counters.generated_tokens += 1
            text.generated += 1
            counters.largest = max(counters.largest, text.prompt + text.generated)
        elif isinstance(event, Finished):
            del self._running[event.handle]
            self._count_finished(event)
        else:
            del self._running[event.handle]
            counters.failed += 1

    def _count_finished(self, event: Finished) -> None:
        result: Completion = event.result  # type: ignore[assignment]  # no beam search is submitted
        self.counters.finished += 1
        self.counters.prompt_seconds += result.stats.prompt_seconds
        self.counters.generation_seconds += result.stats.generation_seconds

    def _end_all(self, error: Exception) -> None:
        """Fail all texts: the step that served them broke off."""
        texts = list(self._running.values())
        self._scheduler.close()
        self._running.clear()
        for text in texts:
            self._fail(text.owner, text.number, _internal(error))


def _internal(error: Exception) -> InternalError:
    return InternalError(f"internal: {type(error).__name__}: {error}")
