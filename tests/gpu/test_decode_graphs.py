"""Both threads of a decode step with missing experts, without a GPU: stand-in events are reached at once."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

decode_graphs = pytest.importorskip("fiddler.gpu.decode_graphs")  # its kernels are Triton's
from fiddler.offload.plan import Costs, Curve  # noqa: E402
from oracles.both_sides import EXACT, LAYERS, E, F, orchestrator  # noqa: E402

MS = 1e-3
COSTS = Costs(Curve((1,), (2 * MS,)), Curve((1,), (0.0,)), 4 * MS, 0.0)  # such that one step of the balance moves rows
K = 2


class Event(threading.Event):
    """Stands for a CUDA event."""

    def record(self, stream=None):
        self.set()

    def query(self):
        return self.is_set()

    synchronize = threading.Event.wait


@pytest.fixture
def graphs(monkeypatch):
    """A `DecodeGraphs` whose graphs choose experts at random."""
    monkeypatch.setattr(decode_graphs.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(decode_graphs.cuda_driver, "copy_to_device", lambda *arguments: None)
    decode = object.__new__(decode_graphs.DecodeGraphs)
    decode._orchestrator = orchestrator(EXACT, [[0], [], []], COSTS)
    decode._recorder = SimpleNamespace(span=lambda *arguments: nullcontext(), queued=lambda *arguments: nullcontext())
    decode._ids, numbers = np.zeros((1, K), np.float32), np.random.default_rng(0)
    decode._x = decode._routing_weights = decode._sum = np.zeros((1, K), np.float32)
    decode._breaks, decode._arrived = list(range(LAYERS)), [Event() for _ in range(LAYERS)]
    decode._taken, decode._ended, decode._streamed_all = Event(), Event(), Event()
    decode._taken.set()
    decode._given, decode._place = np.zeros(2, np.int64), SimpleNamespace(data_ptr=lambda: 0)

    def queue(graph, stream):
        if graph < LAYERS:
            decode._ids[:] = numbers.permutation(E)[:K]
            decode._arrived[graph].set()

    monkeypatch.setattr(decode, "_queue", queue)
    return decode


@pytest.mark.parametrize("late", [0.0, 3 * MS])
def test_rows_of_the_cpu_and_streamed_rows_are_all_rows_of_the_missing_experts(graphs, monkeypatch, late):
    """Also where the worker thread plans only after the CPU has computed its part."""
    caller, on_cpu, on_gpu, real_chosen = threading.get_ident(), [], [], graphs._chosen

    def chosen(layer):
        if threading.get_ident() != caller:
            time.sleep(late)
        return real_chosen(layer)

    def computed(layer, x, expert_ids, routing_weights, split, out):
        time.sleep(MS)
        on_cpu.append(split.cpu_rows)
        return bool(split.cpu_rows.any())

    def streamed(layer, expert_ids, split):
        on_gpu[-1:] = [split.gpu_rows]

    def planned(layer):
        result = chosen(layer)
        if threading.get_ident() != caller:
            on_gpu.append(result[1].gpu_rows)
        return result

    monkeypatch.setattr(graphs, "_chosen", planned)
    monkeypatch.setattr(graphs, "_stream", streamed)
    monkeypatch.setattr(graphs._orchestrator, "on_cpu", computed)
    for token in range(30):
        for event in graphs._arrived:
            event.clear()
        graphs.step(token, token)
    assert len(on_cpu) == len(on_gpu) == 30 * LAYERS
    for rows, gpu_rows in zip(on_cpu, on_gpu, strict=True):
        assert {e: F - rows[e] for e in gpu_rows} == gpu_rows
    assert graphs._orchestrator.balance.seconds != 0


@pytest.mark.parametrize("side", ["on_cpu", "_stream"])
def test_an_error_on_either_side_is_raised_and_the_next_step_is_whole(graphs, monkeypatch, side):
    def fails(*arguments):
        raise ValueError("broken off")

    owner = graphs._orchestrator if side == "on_cpu" else graphs
    monkeypatch.setattr(graphs._orchestrator, "on_cpu", lambda *arguments: True)
    monkeypatch.setattr(graphs, "_stream", lambda *arguments: None)
    real = getattr(owner, side)
    for _ in range(20):
        monkeypatch.setattr(owner, side, fails)
        with pytest.raises(ValueError, match="broken off"):
            graphs.step(1, 1)
        assert not graphs._orchestrator.shared.running
        monkeypatch.setattr(owner, side, real)
        graphs.step(2, 2)
    # the next step of several tokens waits for no sum that nobody computes
    assert graphs._orchestrator.shared.run(lambda: graphs._orchestrator.shared.rest() or 7, lambda part: None) == 7
