"""The two threads of a token's step, without a GPU: what stands for it is reached at once."""

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
COSTS = Costs(Curve((1,), (2 * MS,)), Curve((1,), (0.0,)), 4 * MS, 0.0)  # so that a step of the balance moves rows
K = 2


class Event(threading.Event):
    """A CUDA event."""

    def record(self, stream=None):
        self.set()

    def query(self):
        return self.is_set()

    synchronize = threading.Event.wait


@pytest.fixture
def decoder(monkeypatch):
    """A `DecodeGraphs` whose graphs choose experts at random."""
    monkeypatch.setattr(decode_graphs.torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(decode_graphs.cuda_driver, "copy_to_device", lambda *given: None)
    made = object.__new__(decode_graphs.DecodeGraphs)
    made._orchestrator = orchestrator(EXACT, [[0], [], []], COSTS)
    made._recorder = SimpleNamespace(span=lambda *given: nullcontext(), queued=lambda *given: nullcontext())
    made._ids, numbers = np.zeros((1, K), np.float32), np.random.default_rng(0)
    made._x = made._shares = made._sum = np.zeros((1, K), np.float32)
    made._breaks, made._arrived = list(range(LAYERS)), [Event() for _ in range(LAYERS)]
    made._taken, made._ended, made._streamed_all = Event(), Event(), Event()
    made._taken.set()
    made._given, made._place = np.zeros(2, np.int64), SimpleNamespace(data_ptr=lambda: 0)

    def queue(graph, stream):
        if graph < LAYERS:
            made._ids[:] = numbers.permutation(E)[:K]
            made._arrived[graph].set()

    monkeypatch.setattr(made, "_queue", queue)
    return made


@pytest.mark.parametrize("late", [0.0, 3 * MS])
def test_what_the_cpu_computes_and_what_is_streamed_is_the_whole(decoder, monkeypatch, late):
    """Also where the side thread comes to its plan only when the CPU has computed its part."""
    caller, on_cpu, on_gpu, plan = threading.get_ident(), [], [], decoder._chosen

    def chosen(layer):
        if threading.get_ident() != caller:
            time.sleep(late)
        return plan(layer)

    def computed(layer, x, ids, weights, split, out):
        time.sleep(MS)
        on_cpu.append(split.cpu_rows)
        return bool(split.cpu_rows.any())

    def streamed(layer, ids, split):
        on_gpu[-1:] = [split.gpu_rows]

    def planned(layer):
        found = chosen(layer)
        if threading.get_ident() != caller:
            on_gpu.append(found[1].gpu_rows)
        return found

    monkeypatch.setattr(decoder, "_chosen", planned)
    monkeypatch.setattr(decoder, "_stream", streamed)
    monkeypatch.setattr(decoder._orchestrator, "on_cpu", computed)
    for token in range(30):
        for event in decoder._arrived:
            event.clear()
        decoder.step(token, token)
    assert len(on_cpu) == len(on_gpu) == 30 * LAYERS
    for rows, gpu_rows in zip(on_cpu, on_gpu, strict=True):
        assert {e: F - rows[e] for e in gpu_rows} == gpu_rows
    assert decoder._orchestrator.balance.seconds != 0


@pytest.mark.parametrize("side", ["on_cpu", "_stream"])
def test_an_error_on_either_side_is_raised_and_the_next_token_is_whole(decoder, monkeypatch, side):
    def fails(*given):
        raise ValueError("broken off")

    where = decoder._orchestrator if side == "on_cpu" else decoder
    monkeypatch.setattr(decoder._orchestrator, "on_cpu", lambda *given: True)
    monkeypatch.setattr(decoder, "_stream", lambda *given: None)
    fine = getattr(where, side)
    for _ in range(20):
        monkeypatch.setattr(where, side, fails)
        with pytest.raises(ValueError, match="broken off"):
            decoder.step(1, 1)
        assert not decoder._orchestrator.shared.running
        monkeypatch.setattr(where, side, fine)
        decoder.step(2, 2)
    # what several tokens do next waits for nothing that nobody computes
    assert decoder._orchestrator.shared.run(lambda: decoder._orchestrator.shared.rest() or 7, lambda part: None) == 7
