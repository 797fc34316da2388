"""KV caches in blocks of a pool: sharing, copy on write, wanted rows, windows, and growth that is interrupted."""

from __future__ import annotations

import pytest
import torch

from fiddler.errors import ResourceError
from fiddler.host_memory import peak_memory
from fiddler.loading import load
from fiddler.runtime.block_pool import BlockPool, block_bytes
from fiddler.runtime.paged_kv_cache import PagedKVCache
from fiddler.runtime.step import Step
from fiddler.telemetry.expert_counts import ExpertCounts
from oracles.synthetic import write_random_mixtral


@pytest.fixture(scope="module")
def engine():
    return load(device="cpu", precision="exact")


@pytest.mark.parametrize("wanted", [[], [0], [6], [2, 7], [4, 5, 6], list(range(8))])
def test_a_step_returns_the_wanted_rows_and_caches_all_rows(engine, wanted):
    """They equal those rows of a whole step; the next step is the same after both."""
    runner, parts = engine.runner, [[1, 40, 50, 60, 70], [1, 80], [90]]
    steps = []
    for rows in (None, wanted):
        sequences = [runner.sequence() for _ in parts]
        first = runner.step(list(zip(sequences, parts, strict=True)), rows).hidden
        steps.append((first, runner.step([(sequence, [99]) for sequence in sequences]).hidden))
    (whole, after_whole), (selected, after_selected) = steps
    assert selected.shape == (len(wanted), engine.config.embedding_length)
    assert torch.allclose(selected, whole[wanted], atol=1e-4)
    assert torch.allclose(after_selected, after_whole, atol=1e-4)


def test_prefill_computes_the_last_layers_experts_for_the_last_token_only(engine):
    """As in llama.cpp: of a prompt only the last token needs logits."""
    config = engine.config
    recorder = ExpertCounts(config.block_count, config.expert_count)
    runner = load(device="cpu", precision="exact", recorder=recorder).runner
    runner.prefill(runner.sequence(), list(range(3, 43)))
    *others, last = (sum(counts) for counts in recorder.counts)
    k = config.expert_used_count
    assert (set(others), last) == ({40 * k}, k)


def test_a_step_that_ran_out_of_memory_can_be_repeated(engine, monkeypatch):
    """The pool has no block for some sequence of a step: none has grown, and all go on afterwards."""
    runner, ids = engine.runner, list(range(3, 303))
    first, second = runner.sequence(), runner.sequence()
    runner.step([(first, ids[:250]), (second, ids[:20])])
    real, left = BlockPool.take, iter(range(2))

    def scarce(self):
        if next(left, None) is None:
            raise ResourceError("no block is free")
        return real(self)

    monkeypatch.setattr(BlockPool, "take", scarce)
    with pytest.raises(ResourceError):
        runner.step([(first, ids[250:]), (second, ids[20:120])])
    monkeypatch.undo()
    assert (first.length, second.length) == (250, 20)
    logits = runner.step([(first, ids[250:]), (second, ids[20:120])]).logits
    expected = engine.logits(ids)
    assert torch.allclose(logits, torch.cat([expected[250:], expected[20:120]]), atol=1e-3)


def test_a_fork_shares_blocks_until_one_of_the_two_writes(engine):
    """Only the block that both would write to is copied; they then go on independently."""
    runner, ids, more = engine.runner, list(range(3, 303)), [9, 8, 7]
    first = runner.sequence()
    runner.step([(first, ids)])
    used = runner.pool.used
    second = runner.copy(first)
    assert runner.pool.used == used
    assert second.blocks == first.blocks
    logits = runner.step([(second, more), (first, more[::-1])]).logits
    assert runner.pool.used == used + 1  # 300 positions end in the middle of a block
    assert second.blocks[:9] == first.blocks[:9]
    assert second.blocks[9] is not first.blocks[9]
    expected = torch.cat([engine.logits(ids + tail)[300:] for tail in (more, more[::-1])])
    assert torch.allclose(logits, expected, atol=1e-3)
    for layer in range(engine.config.block_count):
        for one, other in zip(first.stored(layer), second.stored(layer), strict=True):
            assert torch.equal(one[:300], other[:300])
            assert not torch.equal(one[300:], other[300:])
    del second, logits
    assert runner.pool.used == used


def test_a_truncated_sequence_gives_blocks_back_and_writes_to_none_that_another_has(engine):
    runner, ids = engine.runner, list(range(3, 143))
    first = runner.sequence()
    runner.step([(first, ids)])
    second, used = runner.copy(first), runner.pool.used
    second.truncate(70)
    assert len(second.blocks) == 3
    assert runner.pool.used == used
    logits = runner.step([(second, [5, 6])]).logits
    assert runner.pool.used == used + 1
    assert torch.allclose(logits, engine.logits([*ids[:70], 5, 6])[70:], atol=1e-3)
    assert torch.allclose(runner.step([(first, [4])]).logits, engine.logits([*ids, 4])[-1:], atol=1e-3)
    first.truncate(0)
    assert not first.blocks


@pytest.mark.parametrize(
    "lengths, counts, expected",
    [([0], [1], 0), ([999], [1], 0), ([10, 20], [1, 1], 0), ([10, 20], [1, 2], 44)],
)
def test_attention_in_torch_counts_query_and_key_pairs_of_several_tokens(engine, lengths, counts, expected):
    """Single tokens do not count: the decode kernel attends for them."""
    sequences = [engine.runner.sequence() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.reserve(length)
        sequence.length = length
    step = Step(list(zip(sequences, counts, strict=True)), engine.config)
    assert step.seen_by_torch == expected


def test_ctrl_c_while_a_sequence_grows_leaves_one_cache_to_the_kernel_and_torch(monkeypatch):
    engine = load(device="cpu", precision="exact")
    ids = list(range(5, 305))
    whole, broken = engine.runner.sequence(), engine.runner.sequence()
    for sequence in (whole, broken):
        engine.runner.prefill(sequence, ids[:250])
    take, left = BlockPool.take, [1]

    def fail(self):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return take(self)

    with monkeypatch.context() as patch:
        patch.setattr(BlockPool, "take", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.runner.step([(broken, ids[250:])])
    for token in ids[250:254]:  # by the decode kernel
        hidden, expected = (engine.runner.step([(sequence, [token])]).hidden for sequence in (broken, whole))
        assert torch.equal(hidden, expected)
    hidden, expected = (engine.runner.step([(sequence, ids[254:])]).hidden for sequence in (broken, whole))  # by torch
    assert torch.allclose(hidden, expected, atol=1e-5)


def test_a_window_gives_back_blocks_while_tokens_are_generated(tmp_path):
    """The logits are those of the whole text; a prompt's blocks stay until its first generated token."""
    path = write_random_mixtral(tmp_path / "tiny.gguf", window=40, context=512)
    engine = load(path, device="cpu", precision="exact")
    runner, ids = engine.runner, [7 * i % 500 for i in range(200)]
    sequence = runner.sequence()
    runner.prefill(sequence, ids[:130])
    assert None not in sequence.blocks
    rows = [runner.step([(sequence, [token])]).logits for token in ids[130:]]
    assert torch.allclose(torch.cat(rows), engine.logits(ids)[130:], atol=1e-4)
    kept = [block is not None for block in sequence.blocks]
    assert kept == [False] * 5 + [True] * 2  # positions from 200 + 1 - 40 on
    fork = runner.copy(sequence)
    assert torch.equal(*(runner.step([(each, [3])]).logits for each in (sequence, fork)))
    del sequence, fork
    assert runner.pool.used == 0


def test_a_pool_gives_each_block_once_and_takes_back_what_nobody_refers_to(engine):
    pool = BlockPool(engine.config, torch.float32, torch.device("cpu"), 3)
    blocks = [pool.take() for _ in range(3)]
    assert {block.number for block in blocks} == {0, 1, 2}
    assert (pool.available, pool.used) == (0, 3)
    with pytest.raises(ResourceError, match="the 3 blocks of the KV cache are in use"):
        pool.take()
    del blocks[1]
    assert pool.take().number == 1
    assert (pool.available, pool.used) == (1, 2)
    assert block_bytes(engine.config, torch.float32) == pool.memory[0].nbytes


def test_memory_is_taken_as_blocks_are_written(tmp_path):
    """A pool of 1 GiB costs nothing before that."""
    config = load(device="cpu").config
    before = peak_memory().anonymous
    pool = BlockPool(config, torch.float32, torch.device("cpu"), (1 << 30) // block_bytes(config, torch.float32))
    sequence = PagedKVCache(pool, 32 * pool.capacity, None)
    sequence.reserve(3200)
    assert peak_memory().anonymous - before < 8 << 20
    pool.memory[:40].fill_(1)
    grown = peak_memory().anonymous - before
    assert 0.9 * pool.memory[:40].nbytes < grown < pool.memory[:40].nbytes + (8 << 20)
