"""Many generations at once: schedule, step, finish. Sequences join and leave at every step.

All tokens of a step go through the model together, so that an expert that several sequences chose is read once. Knows
no files and no text; which tokens a reply has and when it ends is its own business.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from fiddler.errors import FiddlerError, ResourceError
from fiddler.generation.batch_size import BatchSize, tokens_per_sequence
from fiddler.generation.completion import Completion, Generation
from fiddler.generation.generate import choose
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner

__all__ = ["Batch", "Outcome"]

Outcome = Completion | FiddlerError


class _Member:
    """A generation that takes part. What its sequence holds is the beginning of `tokens`, all there are so far."""

    def __init__(self, place: int, generation: Generation) -> None:
        self.place, self.generation = place, generation
        self.tokens = list(generation.prompt)
        self.reply, self.sampler = generation.begin()
        self.most = len(self.tokens) + generation.limit  # positions
        self.sequence: KVCache | None = None
        self.started = self.first = 0.0

    @property
    def lacks(self) -> int:
        """How many of the tokens its sequence does not hold yet: one, where it goes on, and many of a prompt."""
        assert self.sequence is not None, "it has not joined"
        return len(self.tokens) - self.sequence.length


class Batch:
    """Iterate for each generation's place among those given, and its `Completion` or error, as they finish.

    Generations are taken from the iterable only when there is room for them.
    """

    def __init__(
        self,
        runner: Runner,
        generations: Iterable[Generation],
        room: int | None,
        width: BatchSize,
        on_step: Callable[[int, int], None] = lambda generated, sequences: None,
    ) -> None:
        """room: bytes for keys and values; None for no limit.

        on_step: is told after each step how many tokens were generated so far, and the sequences of that step.
        """
        self._runner, self._room, self._batch_size, self._on_step = runner, room, width, on_step
        self._given = enumerate(generations)
        self._waiting: deque[_Member] = deque()  # those that came and had no room, or had to give it up
        self._members: list[_Member] = []
        self._generated = 0

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        while True:
            yield from self._schedule()
            if not self._members:
                return
            began, sequences = time.perf_counter(), len(self._members)
            counts = tokens_per_sequence([member.lacks for member in self._members], self._runner.chunk)
            try:
                whole = self._step(counts)
            except (ResourceError, MemoryError) as error:
                failed = _as_error(error)
            else:
                outcomes = [outcome for member, logits in whole for outcome in self._go_on(member, logits)]
                if counts == [1] * sequences:
                    self._batch_size.measured(sequences, time.perf_counter() - began)
                self._on_step(self._generated, sequences)
                yield from outcomes
                continue
            yield from self._make_room(failed)

    def _schedule(self) -> Iterator[tuple[int, Outcome]]:
        """Let as many join as there is room for; at least one. Gives out those that have nothing to compute."""
        while len(self._members) < self._batch_size.now:
            member = self._next()
            if member is None:
                return
            if member.reply.finish_reason is not None:
                now = time.perf_counter()
                yield member.place, member.generation.completed(member.reply, member.sampler, now, now)
                continue
            if not self._fits(member):
                self._waiting.appendleft(member)
                return
            try:
                member.sequence = self._runner.sequence(member.most)
            except (ResourceError, MemoryError) as error:
                if not self._members:
                    yield member.place, _as_error(error)
                    continue
                self._waiting.appendleft(member)
                self._batch_size.limit(len(self._members))
                return
            member.started = member.started or time.perf_counter()
            self._members.append(member)

    def _next(self) -> _Member | None:
        if self._waiting:
            return self._waiting.popleft()
        found = next(self._given, None)
        return None if found is None else _Member(*found)

    def _fits(self, member: _Member) -> bool:
        """Whether there is room for all that it may become, beside what the others may."""
        if self._room is None or not self._members:
            return True
        return sum(self._runner.kv_bytes(one.most) for one in (*self._members, member)) <= self._room

    def _step(self, counts: list[int]) -> list[tuple[_Member, np.ndarray]]:
        """So many tokens of each through the model: logits [V] for those that lack none then.

        Where that fails, nothing has changed.
        """
        parts, rows, whole, end = [], [], [], 0
        for member, count in zip(self._members, counts, strict=True):
            if count:
                assert member.sequence is not None, "it has not joined"
                held = member.sequence.length
                parts.append((member.sequence, member.tokens[held : held + count]))
            end += count
            if count == member.lacks:
                whole.append(member)
                rows.append(end - 1)
        before = [sequence.length for sequence, _ in parts]
        try:
            hidden = self._runner.step(parts, wanted=rows or [end - 1])  # where no prompt ends, any one
            if not rows:
                return []
            logits = self._runner.logits(hidden)
        except BaseException:
            for (sequence, _), length in zip(parts, before, strict=True):
                sequence.truncate(length)
            raise
        return list(zip(whole, logits.numpy(), strict=True))

    def _go_on(self, member: _Member, logits: np.ndarray) -> list[tuple[int, Outcome]]:
        """Choose a member's next token. Where it is the last one the member leaves, and this is its outcome."""
        try:
            token = choose(logits, member.tokens, member.sampler)
            last = member.sampler.finished
        except FiddlerError as error:
            return [self._leave(member, error)]
        if not member.reply.tokens:
            member.first = time.perf_counter()
        member.tokens.append(token)
        member.reply.push(token, last=last)
        self._generated += 1
        if member.reply.finish_reason is None:
            return []
        return [
            self._leave(member, member.generation.completed(member.reply, member.sampler, member.started, member.first))
        ]

    def _make_room(self, error: FiddlerError) -> Iterator[tuple[int, Outcome]]:
        """A step did not fit: who came last waits, and reads what it has so far again. One alone has failed."""
        if len(self._members) == 1:
            yield self._leave(self._members[0], error)
            return
        last = self._members.pop()
        last.sequence = None
        self._waiting.appendleft(last)
        self._batch_size.limit(len(self._members))

    def _leave(self, member: _Member, outcome: Outcome) -> tuple[int, Outcome]:
        self._members.remove(member)
        member.sequence = None
        return member.place, outcome


def _as_error(error: ResourceError | MemoryError) -> FiddlerError:
    """Without its traceback, which would keep what the step had computed."""
    if isinstance(error, MemoryError):
        return ResourceError("out of memory; close other programs, or give shorter prompts or fewer tokens")
    return ResourceError(str(error))
