"""Many generations at once: schedule, step, finish. Sequences join and leave at every step.

All tokens of a step go through the model together, so that an expert that several sequences chose is read once. Knows
no files and no text: each `Reply` decides when it has ended.
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
    """A generation of the batch. `tokens`: all so far; its sequence holds a prefix of them."""

    def __init__(self, index: int, generation: Generation) -> None:
        self.index, self.generation = index, generation
        self.tokens = list(generation.prompt)
        self.reply, self.sampler = generation.begin()
        self.max_positions = len(self.tokens) + generation.limit
        self.sequence: KVCache | None = None
        self.started = self.first = 0.0

    @property
    def lacking(self) -> int:
        """Tokens that its sequence does not hold yet: one while it decodes, many of a prompt."""
        assert self.sequence is not None, "it has not joined"
        return len(self.tokens) - self.sequence.length


class Batch:
    """Iterate for the index of each generation, and its `Completion` or error, as they finish.

    Generations are taken from the iterable only when there is memory for them.
    """

    def __init__(
        self,
        runner: Runner,
        generations: Iterable[Generation],
        max_kv_bytes: int | None,
        batch_size: BatchSize,
        on_step: Callable[[int, int], None] = lambda generated, sequences: None,
    ) -> None:
        """max_kv_bytes: of the KV caches of all sequences; None for no limit.

        on_step: called after each step with the tokens generated so far and the number of sequences in the step.
        """
        self._runner, self._max_kv_bytes, self._batch_size, self._on_step = runner, max_kv_bytes, batch_size, on_step
        self._generations = enumerate(generations)
        self._waiting: deque[_Member] = deque()  # without memory: not yet, or not any more
        self._members: list[_Member] = []
        self._generated = 0

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        while True:
            yield from self._schedule()
            if not self._members:
                return
            began, sequences = time.perf_counter(), len(self._members)
            counts = tokens_per_sequence([member.lacking for member in self._members], self._runner.chunk)
            try:
                ready = self._step(counts)
            except (ResourceError, MemoryError) as error:
                failed = _as_error(error)
            else:
                outcomes = [outcome for member, logits in ready for outcome in self._advance(member, logits)]
                if counts == [1] * sequences:
                    self._batch_size.measured(sequences, time.perf_counter() - began)
                self._on_step(self._generated, sequences)
                yield from outcomes
                continue
            yield from self._make_room(failed)

    def _schedule(self) -> Iterator[tuple[int, Outcome]]:
        """Let as many join as memory allows, at least one. Yields those that cannot, or have nothing to compute."""
        while len(self._members) < self._batch_size.now:
            member = self._next()
            if member is None:
                return
            if member.reply.finish_reason is not None:
                now = time.perf_counter()
                yield member.index, member.generation.completed(member.reply, member.sampler, now, now)
                continue
            if not self._fits(member):
                self._waiting.appendleft(member)
                return
            try:
                member.sequence = self._runner.sequence(member.max_positions)
            except (ResourceError, MemoryError) as error:
                if not self._members:
                    yield member.index, _as_error(error)
                    continue
                self._waiting.appendleft(member)
                self._batch_size.limit(len(self._members))
                return
            member.started = member.started or time.perf_counter()
            self._members.append(member)

    def _next(self) -> _Member | None:
        if self._waiting:
            return self._waiting.popleft()
        numbered = next(self._generations, None)
        return None if numbered is None else _Member(*numbered)

    def _fits(self, member: _Member) -> bool:
        """Whether the KV caches of this and all other members fit, each at its full length."""
        if self._max_kv_bytes is None or not self._members:
            return True
        return sum(self._runner.kv_bytes(each.max_positions) for each in (*self._members, member)) <= self._max_kv_bytes

    def _step(self, counts: list[int]) -> list[tuple[_Member, np.ndarray]]:
        """Run `counts` tokens of the members through the model: logits [V] for members that lack none afterwards.

        Where that fails, nothing has changed.
        """
        parts, rows, ready, end = [], [], [], 0
        for member, count in zip(self._members, counts, strict=True):
            if count:
                assert member.sequence is not None, "it has not joined"
                cached = member.sequence.length
                parts.append((member.sequence, member.tokens[cached : cached + count]))
            end += count
            if count == member.lacking:
                ready.append(member)
                rows.append(end - 1)
        lengths = [sequence.length for sequence, _ in parts]
        try:
            logits = self._runner.step(parts, wanted=rows).logits
        except BaseException:
            for (sequence, _), length in zip(parts, lengths, strict=True):
                sequence.truncate(length)
            raise
        assert logits is not None
        return list(zip(ready, logits.numpy(), strict=True))

    def _advance(self, member: _Member, logits: np.ndarray) -> list[tuple[int, Outcome]]:
        """Choose a member's next token. If it is the last one, the member leaves, and its outcome is returned."""
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
        """After a step that did not fit, the last member waits, to compute its tokens again later; a lone one fails."""
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
        return member.index, outcome


def _as_error(error: ResourceError | MemoryError) -> FiddlerError:
    """The error without its traceback: that would keep the step's tensors alive."""
    if isinstance(error, MemoryError):
        return ResourceError("out of memory; close other programs, or give shorter prompts or fewer tokens")
    return ResourceError(str(error))
