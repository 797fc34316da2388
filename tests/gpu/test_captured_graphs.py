"""The captured graphs of single tokens, with all they wait for, in Triton's interpreter: the CPU's greedy texts."""

from __future__ import annotations

import os

import pytest
import torch

import fiddler
from fiddler.gpu.decode_graphs import DecodeGraphs
from fiddler.kernels.one_token import Signal
from fiddler.telemetry.recorder import SILENT
from oracles.emulated_cuda import emulated_cuda, patient
from oracles.gpu_in_place import cos_sin_of, engine_in_place
from oracles.interpreter import run_in_interpreter
from oracles.synthetic import write_random_mixtral

try:
    from fiddler.gpu import attention_kernels
    from fiddler.gpu.graph_capture import CapturedGraphs
    from fiddler.gpu.stream_wait_graphs import StreamWaitGraphs
except ImportError:
    attention_kernels = CapturedGraphs = StreamWaitGraphs = None

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GREEDY, LAYERS = fiddler.Sampling(temperature=0.0), 8


@pytest.mark.skipif(GPU or INTERPRETED or attention_kernels is None, reason="the kernels run in this process")
def test_the_graphs_are_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


@pytest.mark.skipif(GPU or not INTERPRETED, reason="Triton's interpreter does not run")
@pytest.mark.parametrize("graphs_of", [CapturedGraphs, StreamWaitGraphs])
def test_kernels_of_graphs_generate_the_texts_of_the_cpu(graphs_of, tmp_path, monkeypatch):
    """Greedy ones, whose steps are begun ahead, and sampled ones between; the signals' numbers overflow."""
    path = write_random_mixtral(tmp_path / "m.gguf", layers=LAYERS, context=64, f=32, d=32, heads=2, kv_heads=1, seed=3)
    requests = [("Once upon", GREEDY, 4), ("The", fiddler.Sampling(seed=1), 2), ("The", GREEDY, 4)]
    expected = [fiddler.load(path, device="cpu", precision="exact").generate(*each).tokens for each in requests]
    residents = [[0, 1, 2, 3] if layer == 3 else [0, 1] for layer in range(LAYERS)]
    engine = engine_in_place(path, attention=attention_kernels, residents=residents)
    runner, cos_sin, begun = engine.runner, cos_sin_of(engine.config, engine.context), []
    with emulated_cuda(monkeypatch):
        with torch.inference_mode():
            graphs = graphs_of(runner.model, runner.orchestrator, runner.pool, cos_sin, SILENT)
        assert graphs.breaks == [0, 1, 2, 4, 5, 6, 7]
        assert graphs.pieces == ([1, 1, 4, 1] if graphs_of is CapturedGraphs else [1] * 7)
        signals = graphs._streaming.signals
        signals._next = first = 2**32 - 30
        for signal in Signal:
            of_chunk = signal in (Signal.SENT, Signal.COMPUTED)
            signals.set(signal, signals.chunk(first, 0) - 1 if of_chunk else first - 1)
        decoder, begin_ahead = DecodeGraphs(graphs, runner.orchestrator, SILENT), graphs.begin_ahead
        patient(decoder, monkeypatch)
        monkeypatch.setattr(graphs, "begin_ahead", lambda *step: (begun.append(1), begin_ahead(*step)))
        runner.decode_with(decoder, cos_sin, attention_kernels)
        assert [engine.generate(*each).tokens for each in requests] == expected
    assert begun
    assert signals._next > 2**32
