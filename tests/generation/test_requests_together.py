"""Requests of every kind in one scheduler: each gets what it gets alone, whatever the others do."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

import fiddler
from fiddler import Constraint, Sampling
from fiddler.errors import RequestError, ResourceError
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.generation.events import Failed, Finished, Joined, PromptRead, Token
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler

GREEDY = Sampling(temperature=0.0)
STORY, CAT, PARK = "Once upon a time", "A cat", "Tom and Lily went to the park. They saw a big dog. The dog was"
IDS = list(range(20, 60))


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu", precision="exact")


def scheduler_of(engine, batch_size=16, max_kv_bytes=None):
    return Scheduler(engine.runner, BatchSize(batch_size), max_kv_bytes)


def finish(scheduler):
    """All events until the scheduler is idle, by handle."""
    events = {}
    while not scheduler.idle:
        for event in scheduler.step():
            events.setdefault(event.handle, []).append(event)
    return events


def together(engine, requests, **options):
    """Run requests in one scheduler: their results or errors, in order."""
    scheduler = scheduler_of(engine, **options)
    handles = [scheduler.add(request) for request in requests]
    events = finish(scheduler)
    ends = [events[handle][-1] for handle in handles]
    return [end.result if isinstance(end, Finished) else end.error for end in ends]


def free_running(engine, prompt, count=8, **options):
    return engine.start(Request(prompt, Sampling(1.0, seed=5), count, ignore_eos=True), **options)


def alone(generation):
    for _ in generation:
        continue
    return generation.completion


def parts(completion):
    return completion.text, completion.tokens, completion.finish_reason


def test_events_name_their_request_and_hold_all_of_its_text(engine, monkeypatch):
    """It joins, then prompt progress, then a token a step, then the completion; of each request in this order."""
    sampling = Sampling(1.0, seed=5, n_probs=2)
    monkeypatch.setattr(engine.runner, "chunk", 16)
    scheduler = scheduler_of(engine)
    handles = [
        scheduler.add(engine.start(Request(prompt, sampling, 8, ignore_eos=True))) for prompt in (STORY, PARK, IDS)
    ]
    assert len(set(handles)) == 3
    events = finish(scheduler)
    assert events.keys() == set(handles)
    for handle, prompt in zip(handles, (STORY, PARK, IDS), strict=True):
        reads = [event for event in events[handle] if isinstance(event, PromptRead)]
        tokens = [event for event in events[handle] if isinstance(event, Token)]
        result = events[handle][-1].result
        joined = Joined(handle, result.stats.cached_tokens, result.stats.prompt_tokens)
        assert events[handle][:-1] == [joined, *reads, *tokens]
        assert parts(result) == parts(alone(free_running(engine, prompt)))
        assert [event.token for event in tokens] == list(result.tokens)
        assert "".join(event.text for event in tokens) == result.text
        assert tuple(event.log_probs for event in tokens) == result.log_probs
        assert {event.total for event in reads} == {result.stats.prompt_tokens} == {reads[-1].read}
        assert [event.read for event in reads] == sorted({event.read for event in reads})
    assert len([event for event in events[handles[2]] if isinstance(event, PromptRead)]) >= 3


def test_cancelling_a_request_leaves_the_others_as_they_are_and_gives_its_memory_back(engine):
    """There is room for three sequences: the fourth request joins when the second is cancelled."""
    prompts, runner = [STORY, CAT, PARK, "One"], engine.runner
    expected = [parts(alone(free_running(engine, prompt))) for prompt in prompts]
    requests = [free_running(engine, prompt) for prompt in prompts]
    room = 3 * max(runner.kv_bytes(len(request.prompt) + request.limit) for request in requests)
    scheduler = scheduler_of(engine, max_kv_bytes=room)
    handles = [scheduler.add(request) for request in requests]
    early = [event for _ in range(3) for event in scheduler.step()]
    assert {event.handle for event in early} == set(handles[:3])
    assert not scheduler.has_room
    scheduler.cancel(handles[1])
    scheduler.cancel(handles[1])  # nothing happens
    events = finish(scheduler)
    assert events.keys() == {handles[0], handles[2], handles[3]}
    for index in (0, 2, 3):
        assert parts(events[handles[index]][-1].result) == expected[index]
    assert scheduler.has_room


def test_a_cancelled_request_that_waits_never_runs(engine):
    scheduler = scheduler_of(engine, batch_size=1)
    first, second, third = (scheduler.add(free_running(engine, prompt)) for prompt in (STORY, CAT, PARK))
    scheduler.cancel(second)
    assert list(finish(scheduler)) == [first, third]


def test_a_closed_scheduler_holds_no_memory(engine, no_collection, monkeypatch):
    engine.runner.forget()
    caches, sequence = [], engine.runner.sequence

    def recorded(*positions):
        cache = sequence(*positions)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(engine.runner, "sequence", recorded)
    scheduler = scheduler_of(engine)
    for request in (
        free_running(engine, STORY),
        engine.start_beams(Request(CAT, max_tokens=9), BeamOptions(3)),
        free_running(engine, PARK),
    ):
        scheduler.add(request)
    for _ in range(4):
        scheduler.step()
    scheduler.close()
    assert scheduler.idle
    assert len(caches) == 3
    assert not any(cache() for cache in caches)
    assert engine.runner.pool.used == engine.runner.prefix_cache.blocks > 0
    engine.runner.forget()
    assert engine.runner.pool.used == 0


@pytest.mark.parametrize("num_beams", [2, 5])
def test_a_beam_search_and_sampled_texts_in_one_scheduler_give_what_each_gives_alone(engine, num_beams):
    texts = [STORY, CAT]
    expected = [parts(alone(free_running(engine, text, 14))) for text in texts]
    search = engine.start_beams(Request(PARK, max_tokens=14), BeamOptions(num_beams))
    beams = search.run()
    first, found, second = together(
        engine, [free_running(engine, STORY, 14), search, free_running(engine, CAT, 14)], batch_size=num_beams + 2
    )
    assert [parts(first), parts(second)] == expected
    assert [beam.tokens for beam in found.beams] == [beam.tokens for beam in beams]
    np.testing.assert_allclose([beam.score for beam in found.beams], [beam.score for beam in beams], atol=1e-5)
    assert found.stats.generated_tokens == search.stats.generated_tokens


def test_two_beam_searches_share_the_steps(engine, monkeypatch):
    sizes, step = [], engine.runner.step
    searches = [
        engine.start_beams(Request(prompt, max_tokens=10, ignore_eos=True), BeamOptions(3)) for prompt in (STORY, PARK)
    ]
    expected = [search.run() for search in searches]
    monkeypatch.setattr(
        engine.runner,
        "step",
        lambda inputs, *rest, **options: sizes.append(len(inputs)) or step(inputs, *rest, **options),
    )
    found = together(engine, searches)
    assert sizes == [2, *[6] * 9]
    assert [[beam.text for beam in each.beams] for each in found] == [[beam.text for beam in b] for b in expected]


def test_a_beam_search_without_memory_for_a_fork_waits_and_goes_on(engine, monkeypatch):
    """Its sequences go on with what is known of their tokens, and compute the others again."""
    search, failures = engine.start_beams(Request(PARK, max_tokens=10, ignore_eos=True), BeamOptions(3)), iter(range(3))
    beams, expected = search.run(), parts(alone(free_running(engine, STORY)))
    copy = engine.runner.copy

    def scarce(*arguments):
        if next(failures, None) == 1:
            raise ResourceError("no room for a fork")
        return copy(*arguments)

    monkeypatch.setattr(engine.runner, "copy", scarce)
    first, found = together(engine, [free_running(engine, STORY), search])
    assert next(failures, None) is None
    assert parts(first) == expected
    assert [beam.tokens for beam in found.beams] == [beam.tokens for beam in beams]
    failures = iter(range(3))
    with pytest.raises(ResourceError, match="no room for a fork"):
        search.run()


def test_log_probs_a_constraint_and_stop_strings_in_a_batch_give_what_they_give_alone(engine):
    sampling = Sampling(0.9, seed=4, n_probs=3)
    schema = Constraint.json_schema({"type": "string", "maxLength": 20})

    def requests():
        yield engine.start(Request("Lily said", sampling, 40, constraint=schema))
        yield engine.start(Request(STORY, sampling, 30, stop=["little", "there", "was"], ignore_eos=True))
        yield engine.start(Request(CAT, sampling, 12))
        yield engine.start(Request("Tom has", GREEDY, 30, constraint=Constraint.grammar('root ::= "a red boat"')))
        yield engine.start(Request("Tom", GREEDY, 5, constraint=Constraint.grammar('root ::= ""')))

    expected = [alone(generation) for generation in requests()]
    batched = together(engine, requests())
    assert [parts(one) for one in batched] == [parts(one) for one in expected]
    assert [expected[i].finish_reason for i in (1, 3, 4)] == ["stop"] * 3
    for ours, theirs in zip(batched, expected, strict=True):
        assert [step.token for step in ours.log_probs] == [step.token for step in theirs.log_probs]
        values = [[value for _, value in step.top] for step in theirs.log_probs]
        np.testing.assert_allclose([[value for _, value in step.top] for step in ours.log_probs], values, atol=1e-4)
    assert len(batched[0].log_probs) == len(batched[0].tokens) > 1


def test_prompts_of_a_batch_are_resumed_from_their_common_prefix(engine):
    """And side by side: all of them begin with the same blocks."""
    engine.generate(IDS, GREEDY, 2, ignore_eos=True)
    prompts = [[*IDS, 7, 8], [*IDS[:30], 9], [*IDS[:30], 9, 5]]
    expected = [parts(engine.generate(prompt, GREEDY, 4, ignore_eos=True)) for prompt in prompts]
    engine.generate(IDS, GREEDY, 2, ignore_eos=True)
    completions = dict(
        engine.batch((engine.start(Request(p, GREEDY, 4, ignore_eos=True)) for p in prompts), parallel=1)
    )
    assert [parts(completions[index]) for index in range(3)] == expected
    assert [completions[index].stats.cached_tokens for index in range(3)] == [41, 30, 31]
    side_by_side = dict(engine.batch([engine.start(Request(p, GREEDY, 4, ignore_eos=True)) for p in prompts]))
    assert [parts(side_by_side[index]) for index in range(3)] == expected
    assert [side_by_side[index].stats.cached_tokens for index in range(3)] == [41, 30, 31]


def test_a_prompt_cache_file_is_written_and_read_in_a_batch(engine, tmp_path):
    files = [tmp_path / "one", tmp_path / "other"]

    def requests(count):
        for path, prompt in zip(files, (IDS, IDS[::-1]), strict=True):
            yield engine.start(Request(prompt, GREEDY, count, ignore_eos=True), prompt_cache=path)

    engine.runner.forget()
    first = dict(engine.batch(requests(5)))
    assert all(path.stat().st_size for path in files)
    fresh = fiddler.load(device="cpu", precision="exact")
    generation = fresh.start(Request(IDS, GREEDY, 5, ignore_eos=True), prompt_cache=files[0])
    ((_, again),) = fresh.batch([generation])
    assert again.tokens == first[0].tokens
    assert (first[0].stats.cached_tokens, again.stats.cached_tokens) == (0, len(IDS) - 1)


def test_an_error_of_one_request_does_not_end_the_others(engine):
    def fail(sequence):
        raise ResourceError("the disk is full")

    good, bad, search = (
        free_running(engine, STORY),
        free_running(engine, CAT),
        engine.start_beams(Request(PARK, max_tokens=6), BeamOptions(2)),
    )
    bad.after_prompt = fail
    expected = parts(alone(free_running(engine, STORY)))
    unbegun = free_running(engine, CAT)

    def no_sampler():
        raise RequestError("nothing can follow")

    unbegun._new_sampler = no_sampler
    results = together(engine, [good, bad, search, unbegun])
    assert parts(results[0]) == expected
    assert str(results[1]) == "the disk is full"
    assert [beam.tokens for beam in results[2].beams] == [beam.tokens for beam in search.run()]
    assert str(results[3]) == "nothing can follow"
    with pytest.raises(ResourceError, match="the disk is full"):
        alone(bad)


def test_events_survive_an_interrupted_step(engine, monkeypatch):
    """Ctrl-C while one request chooses its token: the tokens of those before it are in the next step's events."""
    expected = [parts(alone(free_running(engine, prompt))) for prompt in (STORY, CAT)]
    scheduler, request = scheduler_of(engine), free_running(engine, CAT)
    first = scheduler.add(free_running(engine, STORY))
    interrupts = iter([KeyboardInterrupt])

    def interrupted(sequence):
        for error in interrupts:
            raise error

    request.after_prompt = interrupted
    second = scheduler.add(request)
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    scheduler.cancel(second)
    events = finish(scheduler)
    assert parts(events[first][-1].result) == expected[0]
    assert sum(isinstance(event, Token) for event in events[first]) == 8
    assert not any(isinstance(event, Failed) for event in events[first])
