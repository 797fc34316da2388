"""Drive a scheduler: one request by itself, step by step, or many requests until all have ended."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator

from fiddler.errors import FiddlerError
from fiddler.generation.batch_size import BatchSize, batch_size
from fiddler.generation.events import Event, Failed, Finished, Result, Token
from fiddler.generation.scheduler import Scheduler
from fiddler.generation.sequence_group import PreparedRequest
from fiddler.runtime.runner import Runner

__all__ = ["Outcome", "new_scheduler", "run_all", "run_alone"]

Outcome = Result | FiddlerError


def run_alone(runner: Runner, request: PreparedRequest) -> Generator[Event]:
    """The events of one request by itself; each step is computed when the caller asks for its events.

    Raises the request's error. To close the iterator cancels the request.
    """
    scheduler = Scheduler(runner, BatchSize(1))
    try:
        scheduler.add(request)
        while not scheduler.idle:
            for event in scheduler.step():
                if isinstance(event, Failed):
                    raise event.error
                yield event
    finally:
        scheduler.close()


def new_scheduler(runner: Runner, parallel: int | None, weights: int) -> Scheduler:
    """A scheduler of at most `parallel` sequences; None: as many as use nearly all of the machine's speed.

    That is told by measured costs, which are measured now where nobody did so before. weights: bytes of mapped files
    that memory must hold beside the KV caches.
    """
    config = runner.model.config
    costs = None if parallel is not None else runner.step_seconds()
    size = batch_size(parallel, runner.chunk, config.expert_count, config.expert_used_count, costs)
    step_tokens = None if costs is None else costs.efficient(runner.chunk)
    return Scheduler(runner, size, runner.room(weights), step_tokens)


def run_all(
    scheduler: Scheduler, requests: Iterable[PreparedRequest | FiddlerError], on_step: Callable[[int, int], None]
) -> Iterator[tuple[int, Outcome]]:
    """The index of each request, and its result or error, as they finish.

    Requests are taken from the iterable only when there is room for them; an error stands for one that could not be
    prepared. on_step: called after each step with the
    tokens generated so far and the number of sequences in the step.
    """
    numbered, indices, generated = enumerate(requests), dict[int, int](), 0
    try:
        while True:
            while scheduler.has_room and (entry := next(numbered, None)) is not None:
                number, request = entry
                if isinstance(request, FiddlerError):
                    yield number, request
                else:
                    indices[scheduler.add(request)] = number
            if scheduler.idle:
                return
            events = scheduler.step()
            generated += sum(isinstance(event, Token) for event in events)
            if scheduler.stepped:
                on_step(generated, scheduler.stepped)
            for event in events:
                if isinstance(event, Finished):
                    yield indices.pop(event.handle), event.result
                elif isinstance(event, Failed):
                    yield indices.pop(event.handle), event.error
    finally:
        scheduler.close()
