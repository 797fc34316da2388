"""Contiguous KV caches, which a GPU's graphs use: shared storage, growth, copies. On the CPU torch attends to them."""

from __future__ import annotations

import pytest
import torch

from fiddler.gpu.contiguous_kv_cache import ContiguousKVCache
from fiddler.loading import load


@pytest.fixture(scope="module")
def engine():
    return load(device="cpu", precision="exact")


@pytest.fixture(scope="module")
def runner(engine):
    """Without the compiled step, which wants paged KV caches."""
    engine.runner._decoder = None
    return engine.runner


def contiguous(engine, context=300, storage=None):
    return ContiguousKVCache(engine.config, context, torch.float32, torch.device("cpu"), storage)


def test_a_sequence_in_anothers_storage_computes_as_in_its_own(engine, runner):
    """It allocates nothing: its keys and values stay where they were."""
    ids = [1, 40, 50, 60, 70]
    first = contiguous(engine)
    first.reserve(300)
    runner.step([(first, ids[::-1])])
    second = contiguous(engine, storage=first.storage)
    addresses = [array.data_ptr() for array in second.storage[0]]
    logits = torch.cat([runner.step([(second, part)]).logits for part in (ids[:3], ids[3:4], ids[4:])])
    assert torch.allclose(logits, engine.logits(ids), atol=1e-4)
    assert [array.data_ptr() for array in second.storage[0]] == addresses


def test_two_sequences_divide_the_storage_of_one(engine, runner):
    """In a step each attends to its own positions only; once truncated, they forget the old ones."""
    parts = [[1, 40, 50, 60, 70], [1, 80, 90, 100, 110]]
    home = contiguous(engine)
    home.reserve(300)
    sequences = home.divided(2, 5)
    for ids in (parts, parts[::-1]):
        for sequence in sequences:
            sequence.truncate(0)
        for begin, end in ((0, 3), (3, 4), (4, 5)):
            logits = runner.step([(s, tokens[begin:end]) for s, tokens in zip(sequences, ids, strict=True)]).logits
        assert torch.allclose(logits, torch.stack([engine.logits(tokens)[-1] for tokens in ids]), atol=1e-4)
    part, whole = sequences[1].storage[0][3], home.storage[0][3]
    assert 0 <= part.data_ptr() - whole.data_ptr() <= whole.nbytes - part.nbytes


def test_a_step_that_ran_out_of_memory_can_be_repeated(engine, runner, monkeypatch):
    """Memory runs out after some layers have grown: afterwards every layer has room, and the cached positions."""
    ids, sequence = list(range(3, 303)), contiguous(engine, 1000)
    runner.step([(sequence, ids[:250])])
    real, left = ContiguousKVCache._empty, iter(range(3))

    def scarce(self, capacity):
        if next(left, None) is None:
            raise MemoryError
        return real(self, capacity)

    monkeypatch.setattr(ContiguousKVCache, "_empty", scarce)
    with pytest.raises(MemoryError):
        runner.step([(sequence, ids[250:])])
    monkeypatch.undo()
    logits = runner.step([(sequence, ids[250:])]).logits
    assert {array.shape[1] for layer in sequence.storage for array in layer} == {512}
    assert torch.allclose(logits, engine.logits(ids)[250:], atol=1e-3)


def test_a_sequence_becomes_a_copy_of_another(engine, runner):
    """A whole copy, or only the positions after a common prefix; the two then go on independently."""
    ids, more = list(range(3, 303)), [9, 8, 7]
    first, second, third = (contiguous(engine, 1000) for _ in range(3))
    runner.step([(first, ids)])
    second.become(first)
    runner.step([(third, ids[:40] + more)])
    third.become(first, 40)
    logits = runner.step([(second, more), (first, more[::-1]), (third, more)]).logits
    again, expected = engine.logits(ids + more[::-1])[300:], engine.logits(ids + more)[300:]
    for rows, expected_rows in zip(logits.split(3), (expected, again, expected), strict=True):
        assert torch.allclose(rows, expected_rows, atol=1e-3)
    third.truncate(10)
    third.become(second, 10)
    for layer, other_layer in zip(second.storage, third.storage, strict=True):
        assert all(torch.equal(a[:, 10:303], b[:, 10:303]) for a, b in zip(layer, other_layer, strict=True))
