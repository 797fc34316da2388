"""Interactive requests beside a batch, and KV caches that grow within a limit: who joins, steps and gives way."""

from __future__ import annotations

import pytest

import fiddler
from fiddler import Sampling
from fiddler.errors import FiddlerError, RequestError
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.events import Failed, Finished, Token
from fiddler.generation.kv_budget import KVBudget
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.generation.turns import Turns
from fiddler.runtime.paged_runner import PagedRunner

GREEDY = Sampling(temperature=0.0)
CHUNK = 20


@pytest.fixture(scope="module")
def demo():
    return fiddler.load(device="cpu", precision="exact")


@pytest.fixture
def runner(demo):
    return PagedRunner(demo.runner.model, demo.runner.context, demo.runner.cache_dtype, demo.runner.threads, CHUNK)


def request(engine, first, length, count, priority="batch", reuse=True):
    ids = [1, *range(first, first + length - 1)]
    return engine.start(Request(ids, GREEDY, count, ignore_eos=True, priority=priority, reuse=reuse))


def run(scheduler, results, steps=5000):
    """Step until nothing is left to do, or so often; `results` gets what finishes or fails."""
    for _ in range(steps):
        if scheduler.idle:
            return
        for event in scheduler.step():
            if isinstance(event, Finished):
                results[event.handle] = event.result.tokens
            elif isinstance(event, Failed):
                results[event.handle] = event.error
    assert steps < 5000, "requests starve"


def test_an_interactive_prompt_is_read_alone_and_both_get_half_of_the_time_afterwards():
    turns, seconds = Turns(), {True: 0.25, False: 1.0}
    assert not turns.alone(reading=False)  # nothing is known yet
    turns.took(1.0, alone=False, reading=False)
    pattern = []
    for _ in range(12):
        alone = turns.alone(reading=False)
        turns.took(seconds[alone], alone=alone, reading=False)
        pattern.append(alone)
    assert pattern == [True, True, True, True, False] * 2 + [True, True]
    reading = []
    for _ in range(40):
        reading.append(turns.alone(reading=True))
        turns.took(1.0, alone=reading[-1], reading=True)
    assert reading.count(False) == 2  # a batch waits for 16 steps at most


def test_steps_alone_that_save_little_are_not_made():
    turns = Turns()
    turns.took(1.0, alone=False, reading=False)
    assert turns.alone(reading=False)
    turns.took(0.9, alone=True, reading=False)
    assert [turns.alone(reading=False) for _ in range(3)] == [False] * 3


def test_the_first_token_of_an_interactive_request_comes_after_its_own_prompt(demo, runner):
    scheduler = Scheduler(runner, BatchSize(16))
    batch = [request(demo, 100 + 40 * n, 35, 12) for n in range(12)]
    handles, results = [scheduler.add(each) for each in batch], {}
    run(scheduler, results, 4)  # some are read, some decode
    assert not results
    asked = request(demo, 900, 3 * CHUNK - 5, 6, "interactive")
    handle = scheduler.add(asked)
    firsts = [scheduler.step() for _ in range(3)]
    assert [event for events in firsts for event in events if event.handle != handle] == []
    assert [isinstance(event, Token) for event in firsts[2] if event.handle == handle][-1]
    run(scheduler, results)
    for each, key in zip([*batch, asked], [*handles, handle], strict=True):
        assert results[key] == each.run().tokens


def test_interactive_requests_join_a_full_batch_and_its_memory_and_the_batch_goes_on_afterwards(demo, runner):
    """Memory for three sequences: a batch fills it; each interactive request takes the place of one of the batch."""
    scheduler = Scheduler(runner, BatchSize(3), 3 * runner.kv_bytes(70))
    batch = [request(demo, 100 + 40 * n, 40, 30, reuse=False) for n in range(5)]
    handles, results = [scheduler.add(each) for each in batch], {}
    run(scheduler, results, 9)
    assert len(scheduler._running) == 3
    asked = [request(demo, 900 + 100 * n, 40, 30, "interactive", reuse=False) for n in range(2)]
    questions = [scheduler.add(each) for each in asked]
    scheduler.step()
    assert set(questions) <= scheduler._running.keys()
    assert len(scheduler._running) == 3
    run(scheduler, results)
    assert set(questions) < set(list(results)[:3])  # those of the batch that gave way end after them
    for each, handle in zip([*batch, *asked], [*handles, *questions], strict=True):
        assert results[handle] == each.run().tokens


def test_a_batch_goes_on_beside_interactive_requests_without_end(demo, runner):
    scheduler, results = Scheduler(runner, BatchSize(4)), {}
    handle = scheduler.add(request(demo, 100, 30, 20))
    for n in range(600):
        if not any(group.interactive for group in scheduler._running.values()):
            scheduler.add(request(demo, 200 + n, 60, 1, "interactive", reuse=False))
        run(scheduler, results, 1)
        if handle in results:
            break
    assert len(results[handle]) == 20


def test_caches_that_outgrow_the_limit_give_way_and_no_text_changes(demo, runner):
    """Four sequences grow by 300 positions; there is room for what they need soon, not for all of it."""
    limit, results, most = 4 * runner.kv_bytes(10 + 256), {}, 0
    scheduler = Scheduler(runner, BatchSize(4), limit)
    requests = [request(demo, 100 + 40 * n, 10, 330, reuse=False) for n in range(4)]
    handles = [scheduler.add(each) for each in requests]
    while not scheduler.idle:
        run(scheduler, results, 1)
        assert len(scheduler._running) == 1 or runner.kv_used() <= limit + 4 * runner.kv_bytes(1)
        most = max(most, len(scheduler._running))
    assert most == 4  # as `max_positions` alone would not let them
    for each, handle in zip(requests, handles, strict=True):
        assert results[handle] == each.run().tokens


def test_a_shared_prompt_counts_once_in_the_budget(demo, runner):
    scheduler, results = Scheduler(runner, BatchSize(1)), {}
    scheduler.add(request(demo, 100, 320, 1))
    run(scheduler, results)
    one = runner.kv_bytes(320 + 1)
    same, other = (request(demo, first, 320, 1).begin() for first in (100, 200))
    assert runner.kv_used() == 0  # only the prefix cache has it
    tight = KVBudget(runner, one // 2)
    assert tight.fits(same, 0)
    assert not tight.fits(other, 0)
    assert KVBudget(runner, one).fits(other, 0)
    assert not tight.exceeded()


def test_an_unexpected_error_of_one_request_ends_this_one_only(demo, runner):
    scheduler, results = Scheduler(runner, BatchSize(4)), {}
    good, bad = (request(demo, first, 10, 8) for first in (100, 200))
    bad._new_sampler = lambda: _Wedged()
    handles = [scheduler.add(each) for each in (good, bad)]
    run(scheduler, results)
    assert results[handles[0]] == good.run().tokens
    assert isinstance(results[handles[1]], FiddlerError)
    assert "ZeroDivisionError" in str(results[handles[1]])


class _Wedged:
    finished, log_probs = False, ()

    def __call__(self, logits, tokens, largest):
        return 1 // 0


def test_a_priority_that_is_none_is_refused():
    with pytest.raises(RequestError, match="priority is 'urgent'; give interactive or batch"):
        Request("One", priority="urgent")
