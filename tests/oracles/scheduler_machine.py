"""A state machine that mixes requests in a scheduler, and compares each text with the one of the request alone."""

from __future__ import annotations

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fiddler
from fiddler import Sampling
from fiddler.generation.batch_size import BatchSize
from fiddler.generation.beam_hypotheses import BeamOptions
from fiddler.generation.events import Failed, Finished
from fiddler.generation.request import Request
from fiddler.generation.scheduler import Scheduler
from fiddler.runtime.block_pool import BlockPool, blocks_for
from fiddler.runtime.prefix_cache import PrefixCache

GREEDY = Sampling(temperature=0.0)
BLOCKS = 12  # of the pool: a few requests, so that some give way
MARGIN = 1e-4  # of the two best logits, where a text may part from the one alone


class Alone:
    """The greedy text of a prompt, one request after the other, without reuse: the naive scheduler."""

    def __init__(self, path):
        self.engine = fiddler.load(path, device="cpu", precision="exact")
        self.texts = {}

    def tokens(self, prompt, count):
        if (prompt, count) not in self.texts:
            request = Request(prompt, GREEDY, count, ignore_eos=True, reuse=False)
            self.texts[prompt, count] = self.engine.start(request).run().tokens
        return self.texts[prompt, count]

    def check(self, prompt, tokens):
        expected = self.tokens(prompt, len(tokens))
        for index, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
            if ours != theirs:
                best = self.engine.logits([*prompt, *expected[:index]])[-1].topk(2).values
                assert best[0] - best[1] <= MARGIN, (prompt, tokens, expected)
                return


def machine(engine, alone, set_up):
    runner = engine.runner

    class Machine(RuleBasedStateMachine):
        @initialize(
            capacity=st.sampled_from([BLOCKS, 40]),
            batch_size=st.integers(1, 6),
            chunk=st.integers(5, 70),
            limit=st.sampled_from([None, 3, 8]),
        )
        def begin(self, capacity, batch_size, chunk, limit):
            set_up(runner, capacity)
            self.capacity, runner.chunk = capacity, chunk
            nbytes = None if limit is None else limit * runner.kv_bytes(1)
            self.scheduler = Scheduler(runner, BatchSize(batch_size), nbytes)
            self.requests = {}  # handle -> prompt and number of tokens
            self.cancelled, self.ended = set(), {}

        @rule(
            runs=st.lists(st.tuples(st.integers(20, 22), st.integers(1, 50)), min_size=1, max_size=3),
            count=st.integers(0, 40),
            reuse=st.booleans(),
            priority=st.sampled_from(["interactive", "batch"]),
        )
        def add(self, runs, count, reuse, priority):
            prompt = tuple(token for token, length in runs for _ in range(length))
            request = Request(prompt, GREEDY, count, ignore_eos=True, reuse=reuse, priority=priority)
            self.requests[self.scheduler.add(engine.start(request))] = prompt, count

        @rule(count=st.integers(1, 6), beams=st.integers(2, 3))
        def search(self, count, beams):
            """A beam search among the others: its beams fork."""
            prompt = (20,) * 40
            request = Request(prompt, max_tokens=count, ignore_eos=True)
            self.requests[self.scheduler.add(engine.start_beams(request, BeamOptions(beams)))] = prompt, -count

        @precondition(lambda self: self.requests.keys() - self.ended.keys() - self.cancelled)
        @rule(data=st.data())
        def cancel(self, data):
            running = sorted(self.requests.keys() - self.ended.keys() - self.cancelled)
            handle = running[data.draw(st.integers(0, len(running) - 1))]
            self.scheduler.cancel(handle)
            self.cancelled.add(handle)

        @rule()
        def others_need_memory(self):
            """Blocks of past sequences, and of those that wait, go as far as they can."""
            while runner.pool.reclaim():
                continue

        @rule(steps=st.integers(1, 12))
        def step(self, steps):
            for _ in range(steps):
                for event in self.scheduler.step():
                    assert event.handle not in self.cancelled | self.ended.keys()
                    if isinstance(event, Failed | Finished):
                        self.ended[event.handle] = event

        @invariant()
        def no_block_is_lost(self):
            if hasattr(self, "scheduler"):
                pool, running = runner.pool, self.scheduler._running.values()
                caches = [each.cache for group in running for each in (*group.sequences, *group.free) if each.cache]
                held = {block.number for cache in caches for block in cache.blocks}
                assert len(held) <= pool.used <= len(held) + runner.prefix_cache.blocks
                store = runner.prefix_cache.store
                assert store is None or store.used == runner.prefix_cache.stored <= store.capacity

        def teardown(self):
            if not hasattr(self, "scheduler"):
                return
            steps = 0
            while not self.scheduler.idle:
                self.step(1)
                steps += 1
                assert steps < 5000, "requests starve"
            assert self.ended.keys() | self.cancelled == self.requests.keys()
            for handle, event in self.ended.items():
                prompt, count = self.requests[handle]
                if isinstance(event, Failed):
                    assert count < 0 or blocks_for(len(prompt) + count) > self.capacity, event.error
                elif count >= 0:
                    assert len(event.result.tokens) == count
                    alone.check(prompt, event.result.tokens)
            runner.forget()
            assert runner.pool.used == 0
            assert runner.prefix_cache.store is None or runner.prefix_cache.store.used == 0

    return Machine


def limit_blocks(runner, capacity):
    """A new pool of so many blocks, of which past sequences may hold half."""
    runner.pool = BlockPool(runner.model.config, runner.cache_dtype, runner.pool.device, capacity)
    runner.prefix_cache = PrefixCache(runner.pool, capacity // 2)


def mix(engine, alone, examples, set_up=limit_blocks):
    """Run the machine on `engine`. set_up: gives its runner room for a number of blocks, of which none are in use."""
    case = machine(engine, alone, set_up).TestCase
    case.settings = settings(max_examples=examples, stateful_step_count=20, deadline=None)
    case("runTest").runTest()
