"""Many requests that join at once: each is looked at once, in the order of arrival, and none overtakes another."""

from __future__ import annotations

import random

import pytest

import fiddler
from fiddler import Sampling
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.events import Finished, Joined
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.runtime.paged_runner import PagedRunner

GREEDY = Sampling(temperature=0.0)
CHUNK, PREFIX = 40, list(range(100, 200))


class CountingRunner(PagedRunner):
    """Counts how often it looks for a prompt's known prefix."""

    looked = 0

    def matched(self, ids):
        self.looked += 1
        return super().matched(ids)


@pytest.fixture(scope="module")
def demo():
    return fiddler.load(device="cpu", precision="exact")


@pytest.fixture
def runner(demo):
    return CountingRunner(demo.runner.model, demo.runner.context, demo.runner.cache_dtype, demo.runner.threads, CHUNK)


def request(demo, ids, count=2, priority="interactive"):
    return demo.start(Request([1, *ids], GREEDY, count, ignore_eos=True, priority=priority))


def running(scheduler):
    return list(scheduler._running)


@pytest.mark.parametrize("limit", [None, 1 << 40])
def test_the_work_of_adding_requests_that_await_one_prompt_grows_with_their_number_alone(demo, runner, limit):
    scheduler, count = Scheduler(runner, BatchSize(64), limit), 30
    requests = [request(demo, [*PREFIX, 200 + n, 201, 202]) for n in range(count)]
    handles = [scheduler.add(each) for each in requests]
    assert running(scheduler) == handles[:1]
    assert runner.looked <= 3 * count
    events = []
    while not scheduler.idle:
        runner.looked = 0
        events += scheduler.step()
        assert runner.looked <= 3 * count
    joined = [event for event in events if isinstance(event, Joined)]
    assert [event.handle for event in joined] == handles
    assert [event.cached for event in joined] == [0, *[len(PREFIX) + 1] * (count - 1)]
    results = {event.handle: event.result.tokens for event in events if isinstance(event, Finished)}
    assert [results[handle] for handle in handles] == [each.run().tokens for each in requests]


def test_who_awaits_a_prompt_begins_where_that_request_is_cancelled_and_the_next_one_awaits_this(demo, runner):
    scheduler = Scheduler(runner, BatchSize(8), 1 << 40)
    first, second = (scheduler.add(request(demo, [*PREFIX, last])) for last in (7, 8))
    assert running(scheduler) == [first]
    scheduler.cancel(first)
    third = scheduler.add(request(demo, [*PREFIX, 9]))
    assert running(scheduler) == [second]
    scheduler.step()
    fourth, other = scheduler.add(request(demo, [*PREFIX, 10])), scheduler.add(request(demo, [50, 51]))
    assert running(scheduler) == [second, other]
    scheduler.step()
    scheduler.step()
    fifth = scheduler.add(request(demo, [*PREFIX, 11]))  # the prompt is there: those that came before come first
    assert running(scheduler)[-3:] == [third, fourth, fifth]


def test_an_interactive_request_passes_a_batch_that_awaits_a_prompt(demo, runner):
    scheduler = Scheduler(runner, BatchSize(8), 1 << 40)
    batch = [scheduler.add(request(demo, [*PREFIX, last], priority="batch")) for last in (7, 8, 9)]
    asked = scheduler.add(request(demo, [60, 61, 62]))
    assert running(scheduler) == [batch[0], asked]
    alike = scheduler.add(request(demo, [*PREFIX, 10]))
    assert [handle for handle, _ in scheduler._waiting] == [alike, *batch[1:]]


def test_no_request_overtakes_one_that_awaits_memory(demo, runner):
    scheduler = Scheduler(runner, BatchSize(8), runner.kv_bytes(960))
    first = scheduler.add(request(demo, range(300, 600), 300))
    alike = scheduler.add(request(demo, range(300, 500)))
    large = scheduler.add(request(demo, range(600, 900), 300))
    small = scheduler.add(request(demo, [70, 71]))
    assert running(scheduler) == [first]
    assert [handle for handle, _ in scheduler._waiting] == [alike, large, small]
    scheduler.cancel(large)
    scheduler.step()
    assert running(scheduler) == [first, small]
    scheduler.close()


@pytest.mark.parametrize("seed", range(3))
def test_the_growth_that_is_known_is_that_of_the_running_ones_whatever_happens(demo, runner, seed):
    numbers, limit = random.Random(seed), runner.kv_bytes(1300)
    scheduler, handles, counted = Scheduler(runner, BatchSize(6), limit), [], 0
    for _ in range(250):
        chance = numbers.random()
        if chance < 0.35:
            ids = [
                *PREFIX[: numbers.choice((0, 70, 100))],
                *numbers.choices(range(300, 800), k=numbers.randrange(1, 60)),
            ]
            priority = numbers.choice(("interactive", "batch"))
            handles.append(scheduler.add(request(demo, ids, numbers.randrange(1, 300), priority)))
        elif chance < 0.45 and handles:
            scheduler.cancel(handles.pop(numbers.randrange(len(handles))))
        else:
            scheduler.step()
        fresh = sum(scheduler._kv_budget.growth(group) for group in scheduler._running.values())
        assert scheduler._known_growth in (None, fresh)
        counted += scheduler._known_growth is not None
    assert counted > 20
    scheduler.close()
    assert runner.kv_used() == 0


def test_those_that_join_together_have_memory_beside_each_other(demo, runner):
    """Each needs 300 positions soon, and there are 700: two of three."""
    scheduler = Scheduler(runner, BatchSize(8), runner.kv_bytes(700))
    first = scheduler.add(request(demo, range(300, 600), 300))
    others = [scheduler.add(request(demo, [first + n] * 30, 300)) for n in (7, 8, 9)]
    assert running(scheduler) == [first]
    scheduler.cancel(first)
    scheduler.step()
    assert running(scheduler) == others[:2]
    scheduler.close()


def test_who_knows_a_whole_prompt_awaits_nobody(demo, runner):
    scheduler = Scheduler(runner, BatchSize(8), 1 << 40)
    scheduler.add(request(demo, PREFIX))
    while not scheduler.idle:
        scheduler.step()
    alike = [scheduler.add(request(demo, PREFIX)) for _ in range(3)]
    assert running(scheduler) == alike


def test_the_memory_in_use_is_counted_as_far_as_the_question_needs(runner):
    one = runner.kv_bytes(1)
    past = [runner.sequence() for _ in range(6)]
    for n, sequence in enumerate(past):
        runner.step([(sequence, [n + 5] * 70)], [], logits=False)
        runner.keep(sequence, [n + 5] * 70)
    del past[::2], sequence
    exact = runner.kv_used()
    assert exact == 9 * one
    assert runner.pool.used == 18
    for enough in range(0, 20 * one, one // 2):
        used = runner.kv_used(enough)
        assert used == exact or exact < used <= enough
    assert runner.kv_used(18 * one) == 18 * one  # nothing was counted
    assert runner.prefix_cache.unused() == 9
    assert [runner.prefix_cache.unused(enough) for enough in (0, 1, 8, 9, 10)] == [0, 1, 8, 9, 9]
