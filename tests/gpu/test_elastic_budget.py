"""One budget for keys and values and resident experts, with the CPU in the GPU's place: no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import fiddler
from fiddler.gpu import elastic_budget
from fiddler.offload.evictions import Evictions
from fiddler.offload.residency import least_valuable
from oracles.gpu_in_place import elastic_to, engine_in_place
from oracles.scheduler_machine import Alone, mix
from oracles.synthetic import write_random_mixtral


@pytest.fixture
def path(tmp_path):
    return write_random_mixtral(tmp_path / "tiny.gguf", layers=3)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(elastic_budget, "_ASKED", 1)
    monkeypatch.setattr(elastic_budget, "_PATIENCE", 2)


@pytest.mark.parametrize(
    "residents, counts, fixed, least",
    [
        ([[], []], [[0, 0], [0, 0]], [False, False], None),
        ([[0, 1], [1]], [[5, 3], [9, 4]], [False, False], (0, 1)),  # the rarest
        ([[0, 1], [1]], [[5, 3], [9, 2]], [False, False], (1, 1)),
        ([[0, 1], [1]], [[5, 3], [9, 4]], [True, False], (1, 1)),  # a complete layer stays so
        ([[0], [0, 1]], [[2, 2], [2, 2]], [False, False], (1, 1)),  # equal ones: of the layer with the most
    ],
)
def test_the_resident_that_was_chosen_least_often_is_evicted_first(residents, counts, fixed, least):
    assert least_valuable(residents, counts, fixed) == least


@pytest.mark.parametrize("later", [0, 1 << 12, 1 << 40])
def test_residents_promise_no_more_memory_than_they_have(path, later):
    runner = engine_in_place(path, residents=[[0, 1], [2], [0, 1, 2, 3]]).runner
    evictions = elastic_to(SimpleNamespace(runner=runner), 29)
    budget = elastic_budget.ElasticBudget(runner.pool, runner.pool.room, evictions, later)
    assert budget.displaceable() == min(evictions.evictable, max(later, evictions.evictable // 2))
    assert evictions.evictable > 1 << 12


def test_a_context_grows_at_the_residents_cost_and_they_come_back_afterwards(path, impatient):
    """No allocation fails, and the logits are those of enough memory, also where blocks have moved."""
    engine = engine_in_place(path, residents=[[0, 1], [2], [0, 1, 2, 3]])
    reference = fiddler.load(path, device="cpu", precision="exact")
    runner, ids = engine.runner, [7 * i % 500 for i in range(700)]
    residents = runner.orchestrator.residents
    elastic_to(engine, 29)
    before, expected = residents.by_layer(), reference.logits(ids)
    sequence, counts = runner.sequence(), []
    for begin in range(0, 650, 65):
        logits = runner.step([(sequence, ids[begin : begin + 65])], wanted=[64]).logits
        assert torch.allclose(logits[0], expected[begin + 64], atol=1e-4)
        counts.append(len(residents))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (7, 4)  # those of the complete layer stay
    assert not residents.table[0].any()
    runner.keep(sequence, ids[:650])
    sequence.truncate(20)
    sequence = runner.copy(sequence)  # it writes to a block of a high number: no other one is free
    moves = runner.pool.moves
    for position in range(20, 120):
        logits = runner.step([(sequence, ids[position : position + 1])]).logits[0]
        assert torch.allclose(logits, expected[position], atol=1e-4)
    assert residents.by_layer() == before
    assert residents.table[0, :2, :3].all()
    assert runner.pool.moves > moves
    cached = runner.matched(ids)
    assert 250 < cached < 650
    resumed = runner.resume(ids)
    assert resumed.length == cached
    rows = runner.step([(resumed, ids[cached : cached + 50])]).logits
    assert torch.allclose(rows, expected[cached : cached + 50], atol=1e-4)
    del sequence, resumed
    runner.forget()
    assert runner.pool.used == 0


def test_requests_in_any_mixture_give_what_each_gives_alone_while_residents_come_and_go(
    tmp_path, impatient, monkeypatch
):
    path = write_random_mixtral(tmp_path / "two.gguf")
    engine, last, calls = engine_in_place(path, residents=[[0, 1, 2], [1, 2, 3]]), [], []
    for name in ("evict", "restore"):
        real = getattr(Evictions, name)
        monkeypatch.setattr(Evictions, name, lambda self, name=name, real=real: calls.append(name) or real(self))

    def set_up(runner, capacity):
        last[:] = [elastic_to(engine, 18 if capacity < 20 else 22, last[0] if last else None)]

    alone = Alone(path)
    for _ in range(12):  # until chance has made residents go and come back some times
        mix(engine, alone, 12, set_up)
        if min(calls.count("evict"), calls.count("restore")) > 3:
            return
    pytest.fail(f"only {calls}")
