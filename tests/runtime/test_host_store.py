"""Blocks that others need are copied to the host and back, where that takes less time than computing them again."""

from __future__ import annotations

import pytest
import torch

from fiddler.cost_curve import Curve
from fiddler.errors import ResourceError
from fiddler.models.config import Config
from fiddler.models.mixtral import MIXTRAL
from fiddler.runtime import host_store
from fiddler.runtime.block_pool import POSITIONS, BlockPool
from fiddler.runtime.host_store import HostStore, host_store_bytes
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.prefix_cache import PrefixCache
from fiddler.runtime.resume_costs import ResumeCosts

CONFIG = Config(MIXTRAL, 64, 1024, 16, 2, 16, 2, 1, 2, 4, 2, 1e-5, 10000.0)
CURVE = Curve((1, 101), (1.0, 3.0))  # 20 ms a token more


@pytest.mark.parametrize(
    "positions, seconds",
    [
        (0, 0.0),
        (50, 1.0),
        (100, 2.0),  # with the one that is computed anyway as many as the curve knows
        (300, 3 * 2.98 + 1.0 - 1.0),  # three steps of 100, and one of one
        (349, 3 * 2.98 + 1.98 - 1.0),
    ],
)
def test_seconds_to_compute_positions_again_follow_the_curve_step_by_step(positions, seconds):
    costs = ResumeCosts(100 if positions > 100 else 200, lambda: CURVE)
    assert costs.recompute(positions) == pytest.approx(seconds)


@pytest.mark.parametrize("nbytes, pays", [(999, True), (1001, False)])
def test_the_fastest_copy_so_far_is_weighed_against_the_curve(nbytes, pays):
    costs = ResumeCosts(512, lambda: CURVE)
    assert costs.copy_pays(1 << 60, 1)  # no copy was measured
    for bytes_copied, took in ((10, 5.0), (1000, 1.0), (100, 50.0), (0, 1.0), (10, 0.0)):
        costs.copied(bytes_copied, took)
    assert costs.copy_pays(nbytes, 50) == pays  # 1 ms a byte; 1 s


def test_without_a_curve_the_fastest_steps_of_several_tokens_count():
    costs = ResumeCosts(512, None)
    costs.copied(1000, 1.0)
    assert costs.copy_pays(1 << 60, 1)  # no step was measured
    costs.stepped(1, 1e-6, ended=True)  # a single token reads as many weights as a prompt
    assert costs.copy_pays(1 << 60, 1)
    costs.stepped(100, 0.001, ended=False)  # queued on the GPU
    costs.stepped(100, 1.999, ended=True)
    costs.stepped(10, 5.0, ended=True)
    assert costs.recompute(50) == pytest.approx(0.5)
    assert costs.copy_pays(499, 50)
    assert not costs.copy_pays(501, 50)
    assert not costs.copy_pays(1, 0)


def new_pool(capacity):
    return BlockPool(CONFIG, torch.float32, torch.device("cpu"), capacity)


def test_blocks_come_back_as_they_were_and_the_store_takes_no_more_than_its_memory(monkeypatch):
    pool = new_pool(20)
    nbytes = pool.memory[0].nbytes
    monkeypatch.setattr(host_store, "_SEGMENT_BYTES", 3 * nbytes)
    store = HostStore(pool, 8 * nbytes - 1, ResumeCosts(512, None))
    blocks = [pool.take() for _ in range(8)]
    for number, block in enumerate(blocks):
        pool.view(block).fill_(number)
    stored = [store.save(block) for block in blocks]
    assert stored[7] is None
    assert [(store.used, store.saves, store.nbytes)] == [(7, 7, 7 * nbytes)]
    for block in blocks:
        pool.view(block).fill_(-1)
    store.load(list(zip(stored[:7], blocks, strict=False)))
    assert [pool.view(block).unique().tolist() for block in blocks] == [[n] for n in [0, 1, 2, 3, 4, 5, 6, -1]]
    del stored[2:5]
    assert store.used == 4
    again = [store.save(blocks[7]) for _ in range(4)]
    assert [each is None for each in again] == [False, False, False, True]
    assert store.nbytes == 7 * nbytes


def test_where_the_system_gives_no_memory_the_store_stays_as_it_is(monkeypatch):
    pool = new_pool(4)
    store = HostStore(pool, 1 << 62, ResumeCosts(512, None))
    store._by = 1 << 50
    assert store.save(pool.take()) is None
    assert store.capacity == store.nbytes == store.used == 0


def test_a_store_gets_half_of_the_memory_for_sequences(monkeypatch):
    for available, weights, expected in [(0, 5, 0), (100, 40, 15), (160, 1000, 5), (1 << 50, 0, 1 << 33)]:
        monkeypatch.setattr(host_store, "available_memory", lambda available=available: available)
        assert host_store_bytes(weights) == expected


def filled(pool, cache, token, blocks, window=None):
    """A sequence of so many blocks in the tree, whose keys are its token."""
    sequence = PagedKVCache(pool, 1000, window)
    count = blocks * POSITIONS
    sequence.reserve(count)
    rows = torch.full((count, 1, 2), float(token))
    for layer in range(2):
        sequence.write(layer, rows, rows)
    sequence.advance(count)
    cache.put(sequence, [token] * count)
    return sequence


@pytest.mark.parametrize("curve, back", [((1.0, 512.0), 3 * POSITIONS), ((1.0, 1.0), 0)])
def test_a_past_sequence_comes_back_from_the_store_where_computing_it_takes_longer(curve, back):
    pool = new_pool(4)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 1 << 20, ResumeCosts(512, lambda: Curve((1, 512), curve)))
    ids = [5] * (3 * POSITIONS)
    filled(pool, cache, 5, 3)
    other = filled(pool, cache, 6, 4)
    assert cache.matched(ids) == 0
    assert cache.stored * POSITIONS == back
    assert cache.take([*ids, 7], 1000, None) is None  # the pool has no room
    del other
    sequence = cache.take([*ids, 7], 1000, None)
    assert (0 if sequence is None else sequence.length) == back
    if sequence is not None:
        assert cache.matched(ids) == back
        assert all((keys == 5).all() for layer in range(2) for keys in sequence.stored(layer))
        assert (cache.stored, cache.store.loads) == (3, 3)  # the other one is there in part


def test_a_full_store_forgets_the_least_recently_used_blocks_but_none_that_come_back():
    pool = new_pool(4)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 3 * pool.memory[0].nbytes, ResumeCosts(512, None))
    for token, blocks in ((5, 2), (6, 2), (7, 4)):
        filled(pool, cache, token, blocks)
    assert (cache.stored, cache.store.saves) == (3, 4)  # the first block of 5, and both of 6
    sequence = cache.take([6] * 100, 1000, None)
    assert sequence.length == 2 * POSITIONS
    assert all((keys == 6).all() for keys in sequence.stored(1))
    assert cache.matched([7] * 100) == 2 * POSITIONS
    assert (cache.stored, cache.store.used) == (1, 1)  # the third of 7; there was room for no more
    del sequence
    assert cache.take([5] * 100, 1000, None) is None


def test_stored_blocks_are_computed_again_where_steps_turn_out_to_be_fast():
    pool, costs = new_pool(4), ResumeCosts(512, None)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 1 << 20, costs)
    filled(pool, cache, 5, 3)
    filled(pool, cache, 6, 4)
    assert cache.stored == 3
    costs.stepped(1 << 40, 1e-9, ended=True)
    assert cache.take([5] * 200, 1000, None) is None
    again = filled(pool, cache, 5, 3)  # its blocks take the place of the stored ones
    assert (cache.matched([5] * 200), cache.store.used, cache.store.loads) == (again.length, 0, 0)


def test_a_copy_that_fails_leaves_the_blocks_in_the_store(monkeypatch):
    pool = new_pool(4)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 1 << 20, ResumeCosts(512, None))
    filled(pool, cache, 5, 3)
    filled(pool, cache, 6, 4)

    def fails(pairs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.store, "load", fails)
    with pytest.raises(KeyboardInterrupt):
        cache.take([5] * 100, 1000, None)
    monkeypatch.undo()
    assert cache.stored == cache.store.used == 6  # those of 6 made room
    assert pool.used == cache.blocks == 1
    assert cache.take([5] * 100, 1000, None).length == 3 * POSITIONS


def test_a_block_of_fewer_positions_does_not_replace_a_stored_one():
    pool = new_pool(3)
    cache = PrefixCache(pool, None)
    cache.store = HostStore(pool, 1 << 20, ResumeCosts(512, None))
    for count in (20, 5):
        sequence = PagedKVCache(pool, 1000, None)
        sequence.reserve(count)
        rows = torch.full((count, 1, 2), 5.0)
        for layer in range(2):
            sequence.write(layer, rows, rows)
        sequence.advance(count)
        cache.put(sequence, [5] * count)
        del sequence
        filled(pool, cache, 6, 3)
    sequence = cache.take([5] * 30, 1000, None)
    assert sequence.length == 20
    assert all((keys == 5).all() for keys in sequence.stored(1))


def test_blocks_behind_a_window_are_free_for_others_and_blocks_in_use_stay_known():
    pool = new_pool(8)
    cache = PrefixCache(pool, None)
    held = filled(pool, cache, 3, 3)
    windowed = filled(pool, cache, 4, 4, window=POSITIONS)
    windowed.reserve(4 * POSITIONS + 1)
    windowed.advance(1)  # gives back its first three blocks, which the tree has
    others = [pool.take() for _ in range(3)]
    assert cache.matched([4] * (4 * POSITIONS)) == 0
    with pytest.raises(ResourceError, match="8 blocks"):
        pool.take()
    assert cache.matched([3] * (3 * POSITIONS)) == held.length  # one is in use: it costs nothing to know it
    del others, windowed
    assert len([pool.take() for _ in range(5)]) == 5
