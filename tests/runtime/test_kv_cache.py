"""Sequences: memory that is taken over, and growth that was broken off."""

from __future__ import annotations

import pytest
import torch

from fiddler.loading import load
from fiddler.runtime.kv_cache import KVCache, Step
from fiddler.telemetry.expert_counts import counting


@pytest.fixture(scope="module")
def engine():
    return load(device="cpu", precision="exact")


def test_a_sequence_takes_over_anothers_memory(engine):
    """It computes as in memory of its own, and uses none."""
    runner, config, ids = engine.runner, engine.config, [1, 40, 50, 60, 70]
    first = KVCache(config, 300, torch.float32, torch.device("cpu"))
    first.reserve(300)
    runner.step([(first, ids[::-1])])
    second = KVCache(config, 300, torch.float32, torch.device("cpu"), first.storage)
    places = [kept.data_ptr() for kept in second.storage[0]]
    made = torch.cat([runner.logits(runner.step([(second, part)])) for part in (ids[:3], ids[3:4], ids[4:])])
    assert torch.allclose(made, engine.logits(ids), atol=1e-4)
    assert [kept.data_ptr() for kept in second.storage[0]] == places


def test_sequences_in_one_sequences_memory(engine):
    """Side by side in a step, of which each sees its own; when they are used again, what was there is forgotten."""
    runner, parts = engine.runner, [[1, 40, 50, 60, 70], [1, 80, 90, 100, 110]]
    home = KVCache(engine.config, 300, torch.float32, torch.device("cpu"))
    home.reserve(300)
    sequences = home.divided(2, 5)
    for ids in (parts, parts[::-1]):
        for sequence in sequences:
            sequence.truncate(0)
        for begin, end in ((0, 3), (3, 4), (4, 5)):
            hidden = runner.step([(s, some[begin:end]) for s, some in zip(sequences, ids, strict=True)])
        made = runner.logits(hidden)
        assert torch.allclose(made, torch.stack([engine.logits(some)[-1] for some in ids]), atol=1e-4)
    kept, room = sequences[1].storage[0][3], home.storage[0][3]
    assert 0 <= kept.data_ptr() - room.data_ptr() <= room.nbytes - kept.nbytes


@pytest.mark.parametrize("wanted", [[], [0], [6], [2, 7], [4, 5, 6], list(range(8))])
def test_a_step_gives_the_rows_that_are_wanted(engine, wanted):
    """They are what the whole step gives; keys and values are kept of all rows."""
    runner, parts = engine.runner, [[1, 40, 50, 60, 70], [1, 80], [90]]
    steps = []
    for rows in (None, wanted):
        sequences = [runner.sequence() for _ in parts]
        first = runner.step(list(zip(sequences, parts, strict=True)), rows)
        steps.append((first, runner.step([(sequence, [99]) for sequence in sequences])))
    (whole, after), (some, then) = steps
    assert some.shape == (len(wanted), engine.config.embedding_length)
    assert torch.allclose(some, whole[wanted], atol=1e-4)
    assert torch.allclose(then, after, atol=1e-4)


def test_the_last_layers_experts_compute_no_other_rows(engine):
    """As llama.cpp's do: a prompt's last token alone is asked for its logits."""
    with counting(engine.runner.model) as counted:
        engine.runner.prefill(engine.runner.sequence(), list(range(3, 43)))
    *others, last = (sum(counts) for counts in counted.counts)
    k = engine.config.expert_used_count
    assert (set(others), last) == ({40 * k}, k)


def test_growth_that_was_broken_off_goes_on(engine, monkeypatch):
    """As where memory runs out half way: every layer has room afterwards, and what was there is still there."""
    runner, ids = engine.runner, list(range(3, 303))
    sequence = runner.sequence()
    runner.step([(sequence, ids[:250])])
    real, left = KVCache._empty, iter(range(3))

    def scarce(self, capacity):
        if next(left, None) is None:
            raise MemoryError
        return real(self, capacity)

    monkeypatch.setattr(KVCache, "_empty", scarce)
    with pytest.raises(MemoryError):
        runner.step([(sequence, ids[250:])])
    monkeypatch.undo()
    made = runner.logits(runner.step([(sequence, ids[250:])]))
    assert {kept.shape[1] for half in sequence.storage for kept in half} == {512}
    assert torch.allclose(made, engine.logits(ids)[250:], atol=1e-3)


def test_a_sequence_becomes_another(engine):
    """All of it, or what comes after a common beginning; either one goes on without the other noticing."""
    runner, ids, more = engine.runner, list(range(3, 303)), [9, 8, 7]
    first, second, third = (runner.sequence() for _ in range(3))
    runner.step([(first, ids)])
    second.become(first)
    runner.step([(third, ids[:40] + more)])
    third.become(first, 40)
    made = runner.logits(runner.step([(second, more), (first, more[::-1]), (third, more)]))
    again, expected = engine.logits(ids + more[::-1])[300:], engine.logits(ids + more)[300:]
    for rows, wanted in zip(made.split(3), (expected, again, expected), strict=True):
        assert torch.allclose(rows, wanted, atol=1e-3)
    third.truncate(10)
    third.become(second, 10)
    for half, other in zip(second.storage, third.storage, strict=True):
        assert all(torch.equal(a[:, 10:303], b[:, 10:303]) for a, b in zip(half, other, strict=True))


@pytest.mark.parametrize(
    "lengths, counts, expected",
    [([0], [1], 0), ([1999], [1], 0), ([10, 20], [1, 1], 0), ([10, 20], [1, 2], 44)],
)
def test_what_torch_attends(engine, lengths, counts, expected):
    """Not single positions, which have a kernel."""
    sequences = [KVCache(engine.config, 2000, torch.float32, torch.device("cpu")) for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.reserve(length)
        sequence.length = length
    step = Step(list(zip(sequences, counts, strict=True)), engine.config)
    assert step.seen_by_torch == expected


def test_growing_that_is_broken_off_leaves_what_the_kernel_and_torch_both_see(monkeypatch):
    engine = load(device="cpu", precision="exact")
    ids = list(range(5, 305))
    whole, broken = engine.runner.sequence(), engine.runner.sequence()
    for sequence in (whole, broken):
        engine.runner.prefill(sequence, ids[:250])
    allocate, left = KVCache._empty, [3]

    def fail(self, capacity):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return allocate(self, capacity)

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "_empty", fail)
        with pytest.raises(KeyboardInterrupt):
            engine.runner.step([(broken, ids[250:])])
    for token in ids[250:254]:  # by our kernel
        made, expected = (engine.runner.step([(sequence, [token])]) for sequence in (broken, whole))
        assert torch.equal(made, expected)
    made, expected = (engine.runner.step([(sequence, ids[254:])]) for sequence in (broken, whole))  # by torch
    assert torch.allclose(made, expected, atol=1e-5)
