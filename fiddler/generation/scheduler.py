"""The decoding loop: schedules requests, runs one step for all their sequences, reports events.

All tokens of a step go through the model together, so that an expert that several sequences chose is read once. Groups
join and leave at every step; one request by itself is a batch of one. Interactive requests join first, and a batch
gives way to them. Knows no files and no text: each group chooses its tokens and decides when it has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fiddler.errors import FiddlerError, ResourceError
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.events import Event, Failed, Finished, Joined, PromptRead, Token
from fiddler.generation.kv_budget import KVBudget
from fiddler.generation.sequence_group import Advance, PreparedRequest, SequenceGroup
from fiddler.generation.sequence_step import compute, tokens_per_sequence
from fiddler.generation.shared_prompts import awaits_prompt
from fiddler.generation.turns import Turns
from fiddler.runtime.runner import Runner

__all__ = ["Scheduler"]


class Scheduler:
    """Runs requests side by side. `step` computes, and only `step`; its caller may `add` and `cancel` in between.

    For one thread; other threads may use other schedulers of the same runner, whose steps come in turn.

    `stepped`: number of sequences in the last step; 0 where none ran, or where memory did not suffice.
    """

    def __init__(
        self,
        runner: Runner,
        batch_size: BatchSize,
        max_kv_bytes: int | None = None,
        step_tokens: int | None = None,
    ) -> None:
        """max_kv_bytes: of the KV caches of all sequences; None for no limit. See `KVBudget`.

        step_tokens: the most tokens of a step that reads prompts; None: the runner's `chunk`. Where the batch size may
        exceed 1, sequences that are not paged reserve their full length when they join; else they grow.
        """
        self._runner, self._batch_size = runner, batch_size
        self._kv_budget, self._turns = KVBudget(runner, max_kv_bytes), Turns()
        self._step_tokens = runner.chunk if step_tokens is None else min(step_tokens, runner.chunk)
        self._grows = batch_size.maximum == 1
        self._waiting: list[tuple[int, SequenceGroup]] = []  # without memory: not yet, or not any more
        self._passed = 0  # of them, the first ones, which await another one's prompt as long as nothing is computed
        self._running: dict[int, SequenceGroup] = {}
        self._known_growth: int | None = None  # see `_growth`
        self._events: list[Event] = []  # not yet returned by `step`
        self._added = 0
        self.stepped = 0

    @property
    def idle(self) -> bool:
        """Whether another step would do and report nothing."""
        return not (self._running or self._waiting or self._events)

    @property
    def has_room(self) -> bool:
        """Whether a request that is added now may join the next step: no other waits, and the batch is not full."""
        return not self._waiting and self._sequences() < self._batch_size.now

    def add(self, request: PreparedRequest) -> int:
        """Let a request join the next step if memory allows it, else as soon as it does. Returns its handle."""
        with self._runner.lock:
            handle = self._added
            self._added += 1
            try:
                self._wait(handle, request.begin())
            except FiddlerError as error:
                self._events.append(Failed(handle, error))
            self._join()
            return handle

    def cancel(self, handle: int) -> None:
        """End a request: it has no more events, and its memory is free for others. Nothing happens if it has ended."""
        self._waiting, self._passed = [entry for entry in self._waiting if entry[0] != handle], 0
        self._events = [event for event in self._events if event.handle != handle]
        with self._runner.lock:
            if handle in self._running:
                self._leave(handle)

    def close(self) -> None:
        """Cancel all requests."""
        self._waiting, self._passed, self._events = [], 0, []
        with self._runner.lock:
            for handle in list(self._running):
                self._leave(handle)

    def take_events(self) -> list[Event]:
        """The events since the last step, which are not told again: of requests that have joined or failed."""
        events, self._events = self._events, []
        return events

    def step(self) -> list[Event]:
        """Run one step for all sequences that there is memory for: the events since the last one, in order.

        Other errors than those of a request are raised; the sequences are then as they were before.
        """
        with self._runner.lock:
            if self._waiting:
                self._join()
            self.stepped, self._passed, self._known_growth = 0, 0, None
            if self._running:
                self._run_step()
        return self.take_events()

    def _run_step(self) -> None:
        while len(self._running) > 1 and self._kv_budget.exceeded():
            self._pause(self._last_joined())
        interactive = {handle: group for handle, group in self._running.items() if group.interactive}
        batch = {handle: group for handle, group in self._running.items() if not group.interactive}
        reading = any(sequence.lacking > 1 for group in interactive.values() for sequence in group.sequences)
        mixed = bool(interactive and batch)
        alone = mixed and self._turns.alone(reading=reading)
        groups = interactive if alone else batch | interactive  # the batch first: it has waited
        sequences = [sequence for group in groups.values() for sequence in group.sequences]
        began = time.perf_counter()
        counts = tokens_per_sequence([sequence.lacking for sequence in sequences], self._step_tokens)
        error = None
        try:
            compute(self._runner, sequences, counts)
        except (ResourceError, MemoryError) as raised:
            error = _without_traceback(raised)
        if error is not None:
            self._give_way(self._last_joined(), error)
            return
        if mixed:
            self._turns.took(time.perf_counter() - began, alone=alone, reading=reading)
        self.stepped, end = len(sequences), 0
        for handle, group in groups.items():
            begin, end = end, end + len(group.sequences)
            self._report_prompt(handle, group, counts[begin:end])
            if not [sequence for sequence in group.sequences if sequence.logits is None]:
                self._share_prompt(group)
                self._advance(handle, group)

    def _report_prompt(self, handle: int, group: SequenceGroup, counts: Sequence[int]) -> None:
        cache, total = group.sequences[0].cache, len(group.prompt)
        assert cache is not None
        if cache.length <= total and any(counts):
            self._events.append(PromptRead(handle, cache.length, total))

    def _share_prompt(self, group: SequenceGroup) -> None:
        """Let other requests begin with a prompt as soon as it is read."""
        cache = group.sequences[0].cache
        assert cache is not None
        if cache.length == len(group.prompt):
            self._runner.share(cache, group.prompt)

    def _advance(self, handle: int, group: SequenceGroup) -> None:
        """Let a group choose its next tokens; copy caches for its forks; it leaves if it has ended."""
        try:
            advance = group.advance()
        except Exception as raised:  # noqa: BLE001 - the others go on, whatever is wrong with one
            self._leave(handle)
            error = raised if isinstance(raised, FiddlerError) else FiddlerError(f"internal error: {raised!r}")
            error.__cause__ = raised if error is not raised else raised.__cause__
            self._events.append(Failed(handle, error))
            return
        for sequence in group.sequences:
            sequence.logits = None
        if advance.token is not None:
            self._events.append(Token(handle, advance.token, advance.text, advance.log_probs))
        if advance.result is not None:
            self._leave(handle)
            self._events.append(Finished(handle, advance.result))
        elif advance.forks:
            self._fork(handle, advance)

    def _fork(self, handle: int, advance: Advance) -> None:
        """Copy KV caches. Where memory does not suffice, the group waits; a lone one fails."""
        error = None
        try:
            for source, target, shared in advance.forks:
                assert source.cache is not None
                target.cache = self._runner.copy(source.cache, target.cache, shared)
        except (ResourceError, MemoryError) as raised:
            error = _without_traceback(raised)
        if error is not None:
            self._give_way(handle, error)

    def _wait(self, handle: int, group: SequenceGroup, *, first: bool = False) -> None:
        """Let a group wait, the last of its priority or the `first`: interactive ones before the others."""
        end = sum([each.interactive for _, each in self._waiting])
        begin, end = (0, end) if group.interactive else (end, len(self._waiting))
        at = begin if first else end
        self._waiting.insert(at, (handle, group))
        self._passed = min(self._passed, at)

    def _join(self) -> None:
        """Let as many waiting groups join as memory and the batch size allow, at least one. Some may fail."""
        while self._passed < len(self._waiting):
            handle, group = self._waiting[self._passed]
            if self._running and not self._fits(group) and not self._batch_pauses_for(group):
                return
            if awaits_prompt(group, self._running.values(), self._runner):
                self._passed += 1
                continue
            del self._waiting[self._passed]
            error = None
            try:
                self._allocate(group)
            except (ResourceError, MemoryError) as raised:
                error = _without_traceback(raised)
            if error is None and self._known_growth is not None:
                self._known_growth += self._kv_budget.growth(group)
            self._running[handle] = group
            if error is not None:
                self._give_way(handle, error)
                if self._running:
                    return
            else:
                cache = group.sequences[0].cache
                assert cache is not None
                self._events.append(Joined(handle, cache.length, len(group.prompt)))

    def _batch_pauses_for(self, group: SequenceGroup) -> bool:
        """Whether this group fits once requests of a batch gave their memory back; as many of them do as it takes."""
        if not group.interactive:
            return False
        while any(not each.interactive for each in self._running.values()):
            self._pause(self._last_joined())
            if not self._running or self._fits(group):
                return True
        return False

    def _allocate(self, group: SequenceGroup) -> None:
        """A KV cache for each sequence of a group, with what is known of its tokens."""
        for index, sequence in enumerate(group.sequences):
            positions = len(sequence.tokens) if self._grows else group.max_positions
            sequence.cache = self._runner.resume(sequence.tokens if group.reuse else (), positions)
            if not index:
                group.joined(sequence.cache.length)

    def _growth(self) -> int:
        """Bytes that the running groups need soon; counted again where one has left or a step has run."""
        if self._known_growth is None:
            self._known_growth = sum([self._kv_budget.growth(group) for group in self._running.values()])
        return self._known_growth

    def _fits(self, group: SequenceGroup) -> bool:
        """Whether this group fits beside the running ones. The batch size counts for those of its priority or above."""
        beside = [each for each in self._running.values() if each.interactive or not group.interactive]
        sequences = group.max_sequences + sum([each.max_sequences for each in beside])
        return sequences <= self._batch_size.now and self._kv_budget.fits(group, self._growth())

    def _sequences(self) -> int:
        return sum([group.max_sequences for group in self._running.values()])

    def _last_joined(self) -> int:
        """The running group that gives way first: one of a batch where there is any."""
        batch = [handle for handle, group in self._running.items() if not group.interactive]
        return batch[-1] if batch else next(reversed(self._running))

    def _give_way(self, handle: int, error: FiddlerError) -> None:
        """Where memory did not suffice, a group waits, and no more run at once from now on; a lone one fails."""
        if len(self._running) == 1:
            self._leave(handle)
            self._events.append(Failed(handle, error))
            return
        self._pause(handle)
        self._batch_size.limit(self._sequences())

    def _pause(self, handle: int) -> None:
        """A group gives its memory back and waits: later it computes again what `resume` does not find by then."""
        group, self._known_growth = self._running.pop(handle), None
        for sequence in group.sequences:
            if sequence.cache is not None:
                self._runner.share(sequence.cache, sequence.tokens)
            sequence.cache = sequence.logits = None
        group.free.clear()
        self._wait(handle, group, first=True)

    def _leave(self, handle: int) -> None:
        """Remove a group. Its sequences are remembered."""
        group, self._known_growth = self._running.pop(handle), None
        for sequence in (*group.free, *reversed(group.sequences)):
            cache, sequence.cache, sequence.logits = sequence.cache, None, None
            if cache is not None:
                self._runner.keep(cache, sequence.tokens)


def _without_traceback(error: ResourceError | MemoryError) -> FiddlerError:
    """The error without its traceback: that would keep the step's tensors alive."""
    if isinstance(error, MemoryError):
        return ResourceError("out of memory; close other programs, or give shorter prompts or fewer tokens")
    return ResourceError(str(error))
