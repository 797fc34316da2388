"""The prefix cache's tree of blocks against a list of all past sequences; blocks are never lost, nor freed in use."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fiddler.errors import ResourceError
from fiddler.models.config import Config
from fiddler.models.mixtral import MIXTRAL
from fiddler.runtime.block_pool import POSITIONS, BlockPool, blocks_for
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.prefix_cache import PrefixCache, common

CONFIG = Config(MIXTRAL, 64, 1024, 16, 1, 16, 2, 1, 2, 4, 2, 1e-5, 10000.0)
CONTEXT = 400


def new_pool(capacity):
    return BlockPool(CONFIG, torch.float32, torch.device("cpu"), capacity)


def extend(sequence, tokens):
    """Append tokens; the keys of each position are the token and its position, so that a wrong block shows."""
    begin = sequence.length
    sequence.reserve(begin + len(tokens))
    rows = torch.tensor([[[float(token), float(begin + i)]] for i, token in enumerate(tokens)]).reshape(-1, 1, 2)
    sequence.write(0, rows, rows)
    sequence.advance(len(tokens))


def held(sequence):
    """The tokens whose keys the sequence holds; positions must be in order."""
    (keys, values) = sequence.stored(0)
    assert torch.equal(keys, values)
    assert keys[:, 0, 1].tolist() == list(range(sequence.length))
    return [int(token) for token in keys[:, 0, 0].tolist()]


def of(pool, cache, tokens):
    """A sequence with these tokens, which begins with what the cache has of them."""
    sequence = cache.take(tokens, CONTEXT, None) or PagedKVCache(pool, CONTEXT, None)
    extend(sequence, tokens[sequence.length :])
    return sequence


@pytest.mark.parametrize(
    "ids, taken", [([5, 6, 7, 8], 3), ([5, 6, 7], 2), ([5], 0), ([5, 6, 9], 2), ([9], 0), ([], 0), ([5, 6, 7, 8, 9], 3)]
)
def test_a_sequence_is_taken_up_to_the_common_prefix(ids, taken):
    """One token of the prompt is left to compute, for its logits. Any number of sequences may take it."""
    pool = new_pool(8)
    cache = PrefixCache(pool, 8)
    sequence = PagedKVCache(pool, CONTEXT, None)
    extend(sequence, [5, 6, 7])
    cache.put(sequence, [5, 6, 7, 8])  # the last one was sampled, not computed
    for _ in range(2):
        found = cache.take(ids, CONTEXT, None)
        assert (0 if found is None else found.length) == taken
        assert found is None or held(found) == ids[:taken]
    assert cache.matched(ids) == common([5, 6, 7], ids)


def test_ten_sequences_that_share_a_prefix_hold_it_once():
    pool = new_pool(400)
    cache = PrefixCache(pool, 400)
    prefix = [n % 50 for n in range(10 * POSITIONS)]
    sequences = [of(pool, cache, [*prefix, 60 + n, 1, 2]) for n in range(1)]
    cache.put(sequences[0], [*prefix, 60, 1, 2])
    sequences += [of(pool, cache, [*prefix, 51 + n, 1, 2]) for n in range(9)]
    assert pool.used == 10 + 10
    assert all(held(sequence)[: len(prefix)] == prefix for sequence in sequences)


def test_the_least_recently_used_leaves_go_first_and_only_where_blocks_are_needed():
    pool = new_pool(6)
    cache = PrefixCache(pool, 6)
    texts = [[n] * (2 * POSITIONS) for n in range(3)]
    for text in texts:
        cache.put(of(pool, cache, text), text)
    assert cache.blocks == pool.used == 6
    assert cache.take(texts[0], CONTEXT, None).length == 2 * POSITIONS - 1  # used now: the second is the oldest
    other = [9] * (2 * POSITIONS)
    running = of(pool, cache, other)
    assert [cache.matched(text) for text in texts] == [2 * POSITIONS, 0, 2 * POSITIONS]
    assert held(running) == other
    longer = PagedKVCache(pool, CONTEXT, None)
    extend(longer, [8] * (4 * POSITIONS))
    assert cache.blocks == 0
    with pytest.raises(ResourceError, match="6 blocks"):
        longer.reserve(CONTEXT)
    assert held(running) == other
    assert held(longer) == [8] * (4 * POSITIONS)


def test_a_limit_of_blocks_holds():
    pool = new_pool(50)
    cache = PrefixCache(pool, 4)
    for n in range(20):
        text = [n] * (3 * POSITIONS + 5)
        cache.put(of(pool, cache, text), text)
        assert cache.blocks == pool.used == 4
    assert cache.matched([19] * CONTEXT) == 3 * POSITIONS + 5


class Requests(RuleBasedStateMachine):
    """Sequences that begin with what the cache has, grow, fork, are cut, remembered and dropped, in a small pool."""

    most = 14  # blocks of past sequences; None: all of the pool's
    nodes = 1000  # blocks of past sequences in pool and store

    def __init__(self):
        super().__init__()
        self.pool = new_pool(24)
        self.cache = PrefixCache(self.pool, self.most, self.nodes)
        self.live: list[tuple[PagedKVCache, list[int]]] = []
        self.past: list[list[int]] = []

    @rule(runs=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 45)), max_size=5), extra=st.integers(0, 3))
    def begin(self, runs, extra):
        """A prompt of runs of few tokens: many have a prefix in common."""
        tokens = [token for token, count in runs for _ in range(count)] + [7, 8, 9][:extra]
        matched = self.cache.matched(tokens)
        assert matched <= max([common(tokens, past) for past in self.past], default=0)
        try:
            sequence = of(self.pool, self.cache, tokens)
        except ResourceError:
            return
        self.live.append((sequence, tokens))

    @rule(data=st.data(), count=st.integers(1, 40), token=st.integers(0, 3))
    def grow(self, data, count, token):
        if self.live:
            sequence, tokens = self.live[data.draw(st.integers(0, len(self.live) - 1))]
            if sequence.length + count <= CONTEXT:
                try:
                    extend(sequence, [token] * count)
                except ResourceError:
                    return
                tokens += [token] * count

    @rule(data=st.data())
    def fork(self, data):
        if self.live:
            sequence, tokens = self.live[data.draw(st.integers(0, len(self.live) - 1))]
            self.live.append((sequence.fork(), list(tokens)))

    @rule(data=st.data(), part=st.floats(0, 1))
    def cut(self, data, part):
        if self.live:
            sequence, tokens = self.live[data.draw(st.integers(0, len(self.live) - 1))]
            del tokens[int(part * len(tokens)) :]
            sequence.truncate(len(tokens))

    @rule(data=st.data(), goes_on=st.booleans())
    def remember(self, data, goes_on):
        if self.live:
            index = data.draw(st.integers(0, len(self.live) - 1))
            sequence, tokens = self.live[index] if goes_on else self.live.pop(index)
            self.cache.put(sequence, tokens)
            self.past.append(list(tokens))
            if self.cache.store is None:
                limit = min(self.nodes, self.most)
                assert self.cache.matched(tokens) == len(tokens) or blocks_for(len(tokens)) > limit

    @rule(data=st.data())
    def drop(self, data):
        if self.live:
            self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))

    @invariant()
    def every_sequence_holds_its_own_tokens(self):
        for sequence, tokens in self.live:
            assert held(sequence) == tokens

    @invariant()
    def no_block_is_lost(self):
        blocks = {block.number for sequence, _ in self.live for block in sequence.blocks}
        assert len(blocks) <= self.pool.used <= len(blocks) + self.cache.blocks
        assert self.most is None or self.cache.blocks <= self.most
        assert self.cache.blocks + self.cache.stored <= self.nodes

    @invariant()
    def every_node_can_be_forgotten_and_its_children_first(self):
        in_pool, stored, behind = list(self.cache._nodes), list(self.cache._stored), [self.cache._root]
        for node in behind:
            behind += node.children
            for child in node.children:
                order = stored if child.block is None else in_pool
                assert node not in order or order.index(child) < order.index(node)
                assert child.block is None or node not in stored
        assert {*in_pool, *stored} == {*behind[1:]}
        assert len(in_pool) + len(stored) == len(behind) - 1

    def teardown(self):
        self.live.clear()
        assert self.pool.used == self.cache.blocks
        self.cache.clear()
        assert (self.pool.used, self.pool.available) == (0, 24)


Requests.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_requests = Requests.TestCase


class RequestsWithFewNodes(Requests):
    """The tree's own memory has a lower limit than its part of the pool."""

    nodes = 9


RequestsWithFewNodes.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
test_requests_with_few_nodes = RequestsWithFewNodes.TestCase


class Choice:
    """Costs by which copying pays, or does not."""

    pays = True

    def copy_pays(self, nbytes, positions):
        assert nbytes > 0
        assert positions > 0
        return self.pays

    def copied(self, nbytes, seconds):
        assert nbytes >= 0


class RequestsWithAStore(Requests):
    """Blocks that others need go to a small store and come back, now and then."""

    most = None

    def __init__(self):
        super().__init__()
        self.costs = Choice()
        self.cache.store = HostStore(self.pool, 9 * self.pool.memory[0].nbytes, self.costs)

    @rule(pays=st.booleans())
    def weigh(self, pays):
        self.costs.pays = pays

    @rule()
    def make_room(self):
        """Others need all that the pool has."""
        try:
            blocks = [self.pool.take() for _ in range(24)]
        except ResourceError:
            return
        del blocks

    @invariant()
    def the_store_holds_what_the_tree_knows(self):
        assert self.cache.store.used == self.cache.stored <= 9

    def teardown(self):
        super().teardown()
        assert self.cache.store.used == 0


RequestsWithAStore.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_requests_with_a_store = RequestsWithAStore.TestCase


class RequestsWithAStoreAndFewNodes(RequestsWithAStore):
    """Pool and store could hold 33 blocks, and the tree may have fewer nodes."""

    nodes = 18


RequestsWithAStoreAndFewNodes.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_requests_with_a_store_and_few_nodes = RequestsWithAStoreAndFewNodes.TestCase


def test_after_ten_thousand_requests_no_block_is_lost():
    pool, numbers = new_pool(64), random.Random(1)
    cache = PrefixCache(pool, 40)
    for _ in range(10_000):
        tokens = [numbers.randrange(3)] * numbers.randrange(1, 120) + [numbers.randrange(60)] * numbers.randrange(1, 40)
        sequence = of(pool, cache, tokens)
        if numbers.random() < 0.7:
            cache.put(sequence, tokens)
        del sequence
        assert pool.used == cache.blocks
    cache.clear()
    assert pool.used == 0
