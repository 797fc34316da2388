"""Sequences that gave way go on from blocks in host memory. Without a GPU, the CPU takes its place."""

from __future__ import annotations

import gc
import sys
import time
import weakref
from contextlib import contextmanager

import pytest
import torch

from fiddler import Sampling
from fiddler.cost_curve import Curve
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.generation.events import Finished, Joined
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.gpu.growing_pool import GrowingPool
from fiddler.loading import load
from fiddler.models import MIXTRAL
from fiddler.models.config import Config
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.resume_costs import ResumeCosts
from oracles.gpu_in_place import engine_in_place, growing
from oracles.scheduler_machine import Alone, mix
from oracles.synthetic import write_random_mixtral

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[token + i % 7 for i in range(70)] for token in (20, 60, 100)]
COUNT = 80  # tokens of each text: the pool has room for two of them
SLOW_STEPS, NO_TIME = Curve((1, 512), (1.0, 512.0)), Curve((1,), (1e-9,))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random_mixtral(tmp_path_factory.mktemp("store") / "tiny.gguf")


@pytest.fixture(scope="module")
def alone(path):
    return Alone(path)


def limited(engine, capacity):
    """A pool of so many blocks: on a GPU the one that graphs have captured, which must have as many."""
    runner = engine.runner
    if not GPU:
        growing(runner, capacity)
        return
    runner.forget()
    assert len(runner.pool.offsets) >= capacity
    runner.pool.capacity, runner.pool.room = capacity, lambda: 0


@pytest.fixture
def engine(path):
    engine = load(path, device="cuda", precision="exact", gpu_experts=3, context=512) if GPU else engine_in_place(path)
    if GPU:
        assert engine.runner.pool.grow()
    limited(engine, 11)
    return engine


def store_by(engine, curve, blocks=40):
    """A store whose copies pay or not by measured seconds of copies, and a curve of steps; None: measured steps."""
    runner = engine.runner
    runner._resume_costs = ResumeCosts(runner.chunk, None if curve is None else lambda: curve)
    runner.prefix_cache.store = HostStore(runner.pool, blocks * runner.kv_bytes(1), runner._resume_costs)
    return runner.prefix_cache.store


@contextmanager
def counting(runner):
    """Yields a list whose sum is the number of tokens that steps have computed."""
    real, computed = runner.compute, []

    def counted(parts, *arguments, **options):
        output = real(parts, *arguments, **options)
        computed.append(sum(len(tokens) for _, tokens in parts))
        return output

    runner.compute = counted
    yield computed
    del runner.compute


def run(engine, limit=None, count=COUNT):
    """Texts of three requests at once, the number of tokens that were computed for them, and events of joining."""
    results, joined = {}, []
    scheduler = Scheduler(engine.runner, BatchSize(3), limit)
    handles = [scheduler.add(engine.start(Request(ids, GREEDY, count, ignore_eos=True))) for ids in PROMPTS]
    with counting(engine.runner) as computed:
        while not scheduler.idle:
            for event in scheduler.step():
                if isinstance(event, Finished):
                    results[event.handle] = event.result.tokens
                elif isinstance(event, Joined):
                    joined.append(event)
    return [results[handle] for handle in handles], sum(computed), joined


def check(engine, alone, texts, count=COUNT):
    for ids, tokens in zip(PROMPTS, texts, strict=True):
        assert len(tokens) == count
        alone.check(tuple(ids), tokens)
    engine.runner.forget()
    assert engine.runner.pool.used == engine.runner.prefix_cache.store.used == 0


@pytest.mark.parametrize("limit, count", [(None, COUNT), (24, 330)], ids=["the pool is full", "the scheduler's limit"])
def test_a_preempted_sequence_goes_on_where_it_was_unless_computing_it_again_is_faster(engine, alone, limit, count):
    if limit is not None:
        limited(engine, limit)
        limit *= engine.runner.kv_bytes(1)
    once = sum(len(ids) + count - 1 for ids in PROMPTS)
    store = store_by(engine, SLOW_STEPS)
    texts, computed, joined = run(engine, limit, count)
    assert len(joined) > 3  # some joined again
    assert store.saves >= store.loads > 0
    assert computed == once
    check(engine, alone, texts, count)
    store = store_by(engine, NO_TIME)
    texts, again, joined = run(engine, limit, count)
    assert len(joined) > 3
    assert store.saves == store.loads == 0
    assert again > once
    check(engine, alone, texts, count)


def test_without_a_curve_the_choice_follows_the_measured_steps(engine, alone):
    store = store_by(engine, None)
    texts, computed, _ = run(engine)
    assert store.loads > 0
    check(engine, alone, texts)
    store = store_by(engine, None)
    engine.runner._resume_costs.stepped(1 << 40, 1e-9, ended=True)
    texts, again, _ = run(engine)
    assert store.loads == 0
    assert again > computed
    check(engine, alone, texts)


def test_steps_whose_result_nobody_awaits_are_timed_together_with_the_next(engine):
    store_by(engine, None)
    runner, told = engine.runner, []
    runner._resume_costs.stepped = lambda tokens, seconds, ended: told.append((tokens, seconds > 0, ended))
    sequence = runner.sequence()
    runner.step([(sequence, [5] * 40)], wanted=())
    runner.step([(sequence, [6] * 30)], wanted=(), logits=False)
    runner.step([(sequence, [7] * 20)], wanted=[19])
    assert told == [(40, True, False), (30, True, False), (20, True, True)]


def test_a_store_of_a_few_blocks_stays_so_small(engine, alone):
    store = store_by(engine, SLOW_STEPS, blocks=2)
    texts, _, _ = run(engine)
    assert store.saves > 2
    assert store.nbytes == 2 * engine.runner.kv_bytes(1)
    check(engine, alone, texts)


def test_the_beams_of_a_preempted_search_go_on_where_they_were(engine):
    limited(engine, 20)
    runner, store = engine.runner, store_by(engine, SLOW_STEPS)
    search = engine.start_beams(Request(PROMPTS[0], max_tokens=20, ignore_eos=True), BeamOptions(3))
    with counting(runner) as computed:
        expected = search.run()
    once = sum(computed)
    runner.forget()
    scheduler, results = Scheduler(runner, BatchSize(3)), []
    handle = scheduler.add(search)
    with counting(runner) as computed:
        while not results:
            if len(computed) == 8:
                scheduler._pause(handle)
                while runner.pool.reclaim():
                    continue
                assert runner.pool.used == 0
                computed.append(0)
            results += [event.result for event in scheduler.step() if isinstance(event, Finished)]
    assert store.loads > 2 + 1  # whole blocks of the prompt, and those in which beams part
    assert sum(computed) == once
    assert [beam.tokens for beam in results[0].beams] == [beam.tokens for beam in expected]


@pytest.mark.parametrize("end", ["cancel", "close", "drop"])
def test_what_ends_while_it_waits_leaves_nothing_behind(engine, alone, end):
    store = store_by(engine, SLOW_STEPS)
    scheduler = Scheduler(engine.runner, BatchSize(4))
    handles = [scheduler.add(engine.start(Request(ids, GREEDY, COUNT, ignore_eos=True))) for ids in PROMPTS]
    handles.append(scheduler.add(engine.start_beams(Request(PROMPTS[0], max_tokens=40), BeamOptions(2))))
    while not store.saves:
        assert not scheduler.idle
        scheduler.step()
    if end == "cancel":
        for handle in handles:
            scheduler.cancel(handle)
        assert scheduler.idle
    elif end == "close":
        scheduler.close()
    else:
        del scheduler
        gc.collect()
    texts, _, _ = run(engine)
    check(engine, alone, texts)


@pytest.mark.skipif(GPU, reason="an engine on a GPU has cycles of torch's")
def test_the_store_goes_with_its_engine(path, no_collection):
    engine = engine_in_place(path)
    engine.runner.store_in_host(1 << 20)
    store = weakref.ref(engine.runner.prefix_cache.store)
    engine.generate(PROMPTS[0], GREEDY, 4)
    del engine
    assert store() is None


def test_requests_in_any_mixture_give_what_each_gives_alone_beside_a_store(engine, alone):
    stores = []

    def set_up(runner, capacity):
        limited(engine, capacity)
        if len(stores) % 3 == 2:
            runner.store_in_host(40 * runner.kv_bytes(1))  # as it is loaded, by the costs of the orchestrator
            stores.append(runner.prefix_cache.store)
        else:
            stores.append(store_by(engine, SLOW_STEPS, blocks=3 + len(stores) % 9))

    for _ in range(10):  # until chance has brought some blocks back
        mix(engine, alone, 12, set_up)
        if sum(store.loads for store in stores) > 20:
            return
    pytest.fail(f"only {[store.loads for store in stores]}")


@on_gpu
def test_loaded_on_a_gpu_blocks_go_through_pinned_memory(path, alone):
    for experts in (3, None):  # a curve of the orchestrator's costs, and measured steps
        engine = load(path, device="cuda", precision="exact", gpu_experts=experts, context=512)
        limited(engine, 11)
        store = engine.runner.prefix_cache.store
        assert store.capacity > 1000
        texts, _, joined = run(engine)
        assert len(joined) > 3
        assert all(segment.is_pinned() for segment in store._segments)
        check(engine, alone, texts)


@on_gpu
def test_time_of_copies_is_printed():
    """For `pytest -rP`: blocks of Mixtral-8x7B there and back, which must come back as they were."""
    config = Config(MIXTRAL, 64, 8192, 4096, 32, 16, 32, 8, 128, 4, 2, 1e-5, 1e4)
    pool = GrowingPool(config, torch.float16, torch.device("cuda"), 64)
    store = HostStore(pool, 64 * pool.memory[0].nbytes, ResumeCosts(512, None))
    blocks = [pool.take() for _ in range(64)]
    pool.memory.view(torch.int16).random_()
    before = pool.memory.clone()
    stored = [store.save(block) for block in blocks]
    for _ in range(2):
        pool.memory.zero_()
        torch.cuda.synchronize()
        began = time.perf_counter()
        store.load(list(zip(stored, blocks, strict=True)))
        seconds = time.perf_counter() - began
        assert torch.equal(pool.memory.view(torch.int16), before.view(torch.int16))
        sys.stdout.write(f"load: {pool.memory.nbytes / seconds / 1e9:.1f} GB/s\n")
    del stored[:]
    began = time.perf_counter()
    stored = [store.save(block) for block in blocks]
    seconds = time.perf_counter() - began
    sys.stdout.write(f"saves one by one: {pool.memory.nbytes / seconds / 1e9:.1f} GB/s\n")
    assert None not in stored
