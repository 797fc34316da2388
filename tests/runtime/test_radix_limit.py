"""The tree's own memory has a limit, in nodes of pool and store together: the least recently used go first."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import OrderedDict
from itertools import product

import pytest
import torch

from fiddler.gpu.growing_pool import GrowingPool
from fiddler.models.config import Config
from fiddler.models.mixtral import MIXTRAL
from fiddler.runtime.block_pool import POSITIONS, BlockPool
from fiddler.runtime.host_store import HostStore
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.prefix_cache import TREE_BYTES, PrefixCache, common
from fiddler.runtime.radix_node import RadixNode, UseOrder, common_tokens, packed
from fiddler.runtime.resume_costs import ResumeCosts

CONFIG = Config(MIXTRAL, 64, 1024, 16, 1, 16, 2, 1, 2, 4, 2, 1e-5, 10000.0)
CPU = torch.device("cpu")
CONTEXT = 4096


def computed(pool, cache, ids, window=None):
    """A sequence of these tokens that begins with what the cache has of them; its keys are its tokens."""
    sequence = cache.take(ids, CONTEXT, window) or PagedKVCache(pool, CONTEXT, window)
    new = ids[sequence.length :]
    sequence.reserve(len(ids))
    rows = torch.tensor(new, dtype=torch.float32).reshape(-1, 1, 1).expand(-1, 1, 2)
    sequence.write(0, rows, rows)
    sequence.advance(len(new))
    return sequence


def tokens_of(text):
    """Tokens whose blocks are one number each."""
    return [number for number in text for _ in range(POSITIONS)]


class Naive:
    """Known prefixes, in whole blocks, in the order of their last use."""

    def __init__(self, most):
        self.most, self.known = most, OrderedDict()

    def use(self, text):
        for end in range(len(text), 0, -1):
            self.known[text[:end]] = None
            self.known.move_to_end(text[:end])
        while len(self.known) > self.most:
            self.known.popitem(last=False)

    def matched(self, text):
        return max(end for end in range(len(text) + 1) if not end or text[:end] in self.known)


@pytest.mark.parametrize("most", [1, 7, 30])
def test_the_tree_knows_what_a_list_in_the_order_of_use_knows(most):
    pool, numbers, naive = BlockPool(CONFIG, torch.float32, CPU, 60), random.Random(most), Naive(most)
    cache = PrefixCache(pool, None, most)
    texts = [text for length in (1, 2, 3, 4) for text in product((1, 300, 70000), repeat=length)]
    for step in range(600):
        text = numbers.choice(texts)
        ids = tokens_of(text)
        if numbers.random() < 0.3:  # asked for with one token more, so that the last block counts
            found = cache.take([*ids, 2], CONTEXT, None)
            assert (0 if found is None else found.length) == naive.matched(text) * POSITIONS
            naive.use(text[: naive.matched(text)])
        else:
            cache.put(computed(pool, cache, ids), ids)
            naive.use(text)
        found = None
        assert cache.blocks == pool.used == len(naive.known)
        if step % 20 == 0:
            assert [cache.matched(tokens_of(each)) for each in texts] == [POSITIONS * naive.matched(t) for t in texts]
    cache.clear()
    assert pool.used == 0


def test_those_in_the_store_go_before_those_in_the_pool():
    """Six blocks of the pool and eight of the store, of which ten may be known."""
    pool = BlockPool(CONFIG, torch.float32, CPU, 6)
    cache = PrefixCache(pool, None, 10)
    cache.store = HostStore(pool, 8 * pool.memory[0].nbytes, ResumeCosts(512, None))
    texts = [tokens_of([number]) for number in range(1, 30)]
    for count, text in enumerate(texts, 1):
        cache.put(computed(pool, cache, text), text)
        assert (cache.blocks, cache.stored) == (min(count, 6), max(0, min(count - 6, 4)))
        assert cache.store.used == cache.stored
    assert [cache.matched(text) > 0 for text in texts] == [False] * 23 + [True] * 6
    assert cache.take([*texts[18], 0], CONTEXT, None) is None
    for text in texts[19:]:  # the ten last ones: four come from the store
        found = cache.take([*text, 0], CONTEXT, None)
        assert found.stored(0)[0][:, 0, 0].tolist() == text
        del found
    cache.clear()
    assert pool.used == cache.store.used == 0


def test_of_a_sequence_longer_than_the_limit_the_first_blocks_stay():
    pool = BlockPool(CONFIG, torch.float32, CPU, 20)
    cache = PrefixCache(pool, None, 3)
    sequence = computed(pool, cache, ids := tokens_of(range(8)))
    cache.put(sequence, ids)
    assert (cache.blocks, pool.used, cache.matched(ids)) == (3, 8, 3 * POSITIONS)
    del sequence
    assert pool.used == 3


def test_behind_a_stored_block_that_a_sequence_gave_back_nothing_is_remembered():
    """Else blocks of the pool would follow one of the store."""
    pool = BlockPool(CONFIG, torch.float32, CPU, 6)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 1 << 20, ResumeCosts(512, None))
    first = computed(pool, cache, ids := tokens_of([1, 2]))
    cache.put(first, ids)
    windowed = computed(pool, PrefixCache(pool, None), tokens_of([1, 2, 3]), POSITIONS)
    pool.reclaim = cache._reclaim
    windowed.reserve(windowed.length + 1)
    windowed.advance(1)
    assert windowed.blocks[0] is windowed.blocks[1] is None
    del first
    others = [pool.take() for _ in range(4)]
    assert (cache.blocks, cache.stored) == (0, 2)
    cache.put(windowed, [*tokens_of([1, 2, 3]), 4])
    assert (cache.blocks, cache.stored, pool.used) == (0, 2, len(others) + 2)
    del windowed, others
    assert cache.take(tokens_of([1, 2, 3]), CONTEXT, None).length == 2 * POSITIONS


def filled(pool, count):
    """A tree of about so many nodes, of random sequences of 31 blocks which share prefixes; its bytes a node."""
    numbers, cache = random.Random(1), PrefixCache(pool, None)
    prefixes = [[numbers.randrange(300, 150_000) for _ in range(200)] for _ in range(10)]
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    while cache.blocks < count:
        ids = [*numbers.choice(prefixes), *[numbers.randrange(300, 150_000) for _ in range(780)]]
        sequence = PagedKVCache(pool, CONTEXT, None)
        sequence.reserve(len(ids))
        sequence.length = len(ids)
        cache.put(sequence, ids)
        del sequence, ids
    gc.collect()
    nbytes = (tracemalloc.get_traced_memory()[0] - before) / cache.blocks
    tracemalloc.stop()
    return cache, nbytes


@pytest.mark.parametrize("kind, most", [(BlockPool, 400), (GrowingPool, 480)])
def test_a_node_takes_the_memory_that_the_limit_assumes(kind, most):
    """tracemalloc counts what is asked for; Python's allocator gives up to 15 bytes more of each of 4 or 5 objects."""
    cache, nbytes = filled(kind(CONFIG, torch.float32, CPU, 12_000), 10_000)
    assert 0.9 * cache.node_bytes < nbytes <= cache.node_bytes <= most
    assert cache.nbytes == cache.blocks * cache.node_bytes
    assert TREE_BYTES == 64 << 20


def test_a_server_with_a_large_pool_forgets_where_the_tree_has_its_memory(monkeypatch):
    monkeypatch.setattr("fiddler.runtime.prefix_cache.TREE_BYTES", 1 << 20)
    pool = GrowingPool(CONFIG, torch.float32, CPU, 6000)
    cache, numbers = PrefixCache(pool, None), random.Random(2)
    for _ in range(200):
        ids = [numbers.randrange(1000) for _ in range(1000)]
        sequence = PagedKVCache(pool, CONTEXT, None)
        sequence.reserve(len(ids))
        sequence.length = len(ids)
        cache.put(sequence, ids)
        assert cache.nbytes <= 1 << 20
    assert cache.nbytes > (1 << 20) - cache.node_bytes
    assert cache.matched(ids) == 1000


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 128, 129, 700, 5000])
def test_packed_blocks_are_int32_of_the_tokens(length):
    ids = [(n * 2_654_435_761) % (1 << 31) for n in range(length)]
    blocks = list(packed(ids))
    assert blocks == [torch.tensor(ids[n : n + 32], dtype=torch.int32).numpy().tobytes() for n in range(0, length, 32)]


def test_tokens_in_common_are_those_of_the_lists_and_beside_a_block_lies_one_that_has_most():
    numbers = random.Random(3)
    tokens = [0, 1, 255, 256, 257, 65_536, (1 << 31) - 1]
    lists = [[numbers.choice(tokens) for _ in range(numbers.randrange(1, 6))] for _ in range(400)]
    node = RadixNode(b"", None, None)
    for ids in lists[:200]:
        (block,) = packed(ids)
        at, children = node.place(block), node.children
        if at == len(children) or children[at].tokens != block:
            node.add(at, RadixNode(block, None, node))
    for ids in lists:
        (block,) = packed(ids)
        most = max(common(ids, other) for other in lists[:200])
        closest, count = node.closest(block)
        assert count == most
        assert (closest is None) == (most == 0)
        assert closest is None or common_tokens(closest.tokens, block) == most
        assert all(
            common_tokens(*(next(packed(each)) for each in (ids, other))) == common(ids, other) for other in lists[:9]
        )
    for child in numbers.sample(list(node.children), len(node.children)):
        node.drop(child)
        assert child not in node.children
    assert node.children == ()


def test_the_order_of_use_is_that_of_an_ordered_dict():
    order, naive, numbers = UseOrder(), OrderedDict(), random.Random(4)
    nodes = [RadixNode(b"", None, None) for _ in range(8)]
    for _ in range(500):
        some = numbers.choices(nodes, k=numbers.randrange(4))
        if numbers.random() < 0.3:
            for node in some:
                order.remove(node)
                naive.pop(node, None)
        else:
            order.use(some)
            for node in some:
                naive[node] = None
                naive.move_to_end(node)
        assert list(order) == list(naive)
        assert len(order) == len(naive)
        assert not naive or order.oldest is next(iter(naive))
