"""The KV cache: shared storage, copies between sequences, wanted rows, and growth that is interrupted."""

from __future__ import annotations

import pytest
import torch

from fiddler.loading import load
from fiddler.runtime.kv_cache import KVCache, Step
from fiddler.telemetry.expert_counts import ExpertCounts


@pytest.fixture(scope="module")
def engine():
    return load(device="cpu", precision="exact")


def test_a_sequence_in_anothers_storage_computes_as_in_its_own(engine):
    """It allocates nothing: its keys and values stay where they were."""
    runner, config, ids = engine.runner, engine.config, [1, 40, 50, 60, 70]
    first = KVCache(config, 300, torch.float32, torch.device("cpu"))
    first.reserve(300)
    runner.step([(first, ids[::-1])])
    second = KVCache(config, 300, torch.float32, torch.device("cpu"), first.storage)
    addresses = [array.data_ptr() for array in second.storage[0]]
    logits = torch.cat([runner.step([(second, part)]).logits for part in (ids[:3], ids[3:4], ids[4:])])
    assert torch.allclose(logits, engine.logits(ids), atol=1e-4)
    assert [array.data_ptr() for array in second.storage[0]] == addresses


def test_two_sequences_divide_the_storage_of_one(engine):
    """In a step each attends to its own positions only; once truncated, they forget the old ones."""
    runner, parts = engine.runner, [[1, 40, 50, 60, 70], [1, 80, 90, 100, 110]]
    home = KVCache(engine.config, 300, torch.float32, torch.device("cpu"))
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
    """Memory runs out after some layers have grown: afterwards every layer has room, and the cached positions."""
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
    logits = runner.step([(sequence, ids[250:])]).logits
    assert {array.shape[1] for layer in sequence.storage for array in layer} == {512}
    assert torch.allclose(logits, engine.logits(ids)[250:], atol=1e-3)


def test_a_sequence_becomes_a_copy_of_another(engine):
    """A whole copy, or only the positions after a common prefix; the two then go on independently."""
    runner, ids, more = engine.runner, list(range(3, 303)), [9, 8, 7]
    first, second, third = (runner.sequence() for _ in range(3))
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


@pytest.mark.parametrize(
    "lengths, counts, expected",
    [([0], [1], 0), ([1999], [1], 0), ([10, 20], [1, 1], 0), ([10, 20], [1, 2], 44)],
)
def test_attention_in_torch_counts_query_and_key_pairs_of_several_tokens(engine, lengths, counts, expected):
    """Single tokens do not count: the decode kernel attends for them."""
    sequences = [KVCache(engine.config, 2000, torch.float32, torch.device("cpu")) for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence.reserve(length)
        sequence.length = length
    step = Step(list(zip(sequences, counts, strict=True)), engine.config)
    assert step.seen_by_torch == expected


def test_ctrl_c_during_growth_leaves_one_cache_to_the_kernel_and_torch(monkeypatch):
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
    for token in ids[250:254]:  # by the decode kernel
        hidden, expected = (engine.runner.step([(sequence, [token])]).hidden for sequence in (broken, whole))
        assert torch.equal(hidden, expected)
    hidden, expected = (engine.runner.step([(sequence, ids[254:])]).hidden for sequence in (broken, whole))  # by torch
    assert torch.allclose(hidden, expected, atol=1e-5)
