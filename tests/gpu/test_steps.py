"""Aborted steps, batches, beams, graph capture and the timeline on the GPU. Needs a GPU."""

from __future__ import annotations

import _thread
import random
import threading
import time

import pytest
import torch

import fiddler
from fiddler.device import cuda_driver
from fiddler.generation.request import Request
from fiddler.loading import load
from fiddler.telemetry.gpu_timeline import GpuTracer

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

GREEDY = fiddler.Sampling(temperature=0.0)
PROMPTS = [
    "Once upon a time, in a small village, there lived",
    "The",
    "The capital of France is Paris, and the capital of Germany is Berlin. The capital of Spain is Madrid, "
    "and the capital of Portugal is Lisbon. " * 3,
    "Two plus two",
    "It was a dark and stormy night; the rain fell in torrents",
]


@pytest.fixture(scope="module")
def cpu_engine():
    return load(device="cpu", precision="exact")


@pytest.fixture(scope="module", params=["no residents", "residents", "a driver that cannot wait"])
def gpu_engine(request):
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "a driver that cannot wait":  # then the worker thread does
            patched.setattr(cuda_driver, "wait_for_value", lambda *arguments: False)
        return load(device="cuda", precision="exact", gpu_experts=0 if request.param == "no residents" else 7)


def texts(engine):
    return [engine.generate(prompt, GREEDY, 24).text for prompt in PROMPTS]


def test_after_a_failed_step_the_next_text_is_right(cpu_engine, gpu_engine, monkeypatch):
    orchestrator, expected = gpu_engine.runner.orchestrator, texts(cpu_engine)
    on_cpu = orchestrator.on_cpu
    for broken in (0, 1, 5, 12):
        left = broken

        def fails(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise ValueError("broken off")
            return on_cpu(*arguments)

        monkeypatch.setattr(orchestrator, "on_cpu", fails)
        with pytest.raises(ValueError, match="broken off"):
            gpu_engine.generate(PROMPTS[0], GREEDY, 60)
        monkeypatch.setattr(orchestrator, "on_cpu", on_cpu)
        assert gpu_engine.generate(PROMPTS[0], GREEDY, 24).text == expected[0]


def test_after_ctrl_c_in_a_step_the_next_text_is_right(cpu_engine, gpu_engine):
    expected, numbers = texts(cpu_engine), random.Random(0)
    for _ in range(25):
        timer = threading.Timer(0.001 + 0.1 * numbers.random(), _thread.interrupt_main)

        def generate_forever(timer=timer):
            timer.start()
            while True:
                gpu_engine.generate(PROMPTS[2], GREEDY, 60)

        with pytest.raises(KeyboardInterrupt):
            generate_forever()
        timer.join()
        assert gpu_engine.generate(PROMPTS[0], GREEDY, 24).text == expected[0]


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_each_prompt_of_a_batch_gets_the_same_text_as_alone(cpu_engine, gpu_engine, batch_size):
    expected = texts(cpu_engine)
    assert texts(gpu_engine) == expected
    completions = dict(
        gpu_engine.batch([gpu_engine.start(Request(prompt, GREEDY, 24)) for prompt in PROMPTS], parallel=batch_size)
    )
    assert [completions[i].text for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_on_the_gpu_are_those_of_the_cpu(cpu_engine, gpu_engine, num_beams):
    for prompt in PROMPTS[:3]:
        ours, theirs = (
            [(beam.tokens, beam.score) for beam in e.beam_search(prompt, num_beams, 12)]
            for e in (gpu_engine, cpu_engine)
        )
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-3)


def test_a_cached_prefix_is_reused_on_the_gpu(cpu_engine, gpu_engine):
    first = gpu_engine.generate(PROMPTS[2], GREEDY, 12)
    longer = PROMPTS[2] + first.text + " and then"
    second = gpu_engine.generate(longer, GREEDY, 12)
    assert second.stats.cached_tokens > 20
    assert second.text == cpu_engine.generate(longer, GREEDY, 12).text


def test_an_aborted_step_holds_no_reference_to_the_sequence(cpu_engine, gpu_engine, no_collection, monkeypatch):
    """Otherwise a batch would begin without that sequence's KV cache, and leave its memory unused."""
    monkeypatch.setattr(gpu_engine.runner.orchestrator, "on_cpu", lambda *arguments: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        gpu_engine.generate(PROMPTS[0], GREEDY, 60)
    monkeypatch.undo()
    assert len(
        dict(gpu_engine.batch([gpu_engine.start(Request(prompt, GREEDY, 24)) for prompt in PROMPTS], parallel=2))
    ) == len(PROMPTS)
    gpu_engine.generate(PROMPTS[2], GREEDY, 24)
    again = gpu_engine.generate(PROMPTS[2], GREEDY, 24)
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert again.text == cpu_engine.generate(PROMPTS[2], GREEDY, 24).text


def test_no_garbage_is_collected_while_graphs_are_captured(cpu_engine, monkeypatch):
    """Freeing another engine's pinned memory would make the driver abort the capture."""
    from fiddler.gpu.graph_capture import CapturedGraphs

    waste, run, captured = [load(device="cuda", precision="exact", gpu_experts=7)], CapturedGraphs._run, 0

    def runs(self, *arguments):
        nonlocal captured
        if torch.cuda.is_current_stream_capturing():
            captured += 1
            if waste:
                cycle = [waste.pop()]
                cycle.append(cycle)
            objects = [[] for _ in range(100_000)]  # enough to start a collection
            assert len(objects) == 100_000
        return run(self, *arguments)

    monkeypatch.setattr(CapturedGraphs, "_run", runs)
    engine = load(device="cuda", precision="exact", gpu_experts=7)
    assert captured
    assert texts(engine) == texts(cpu_engine)


def test_a_failed_graph_capture_raises_and_the_next_one_succeeds(monkeypatch):
    """The process must not end with it."""
    from fiddler.gpu.graph_capture import CapturedGraphs

    run = CapturedGraphs._run

    def fails(self, *arguments):
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("broken off")
        return run(self, *arguments)

    monkeypatch.setattr(CapturedGraphs, "_run", fails)
    with pytest.raises(ValueError, match="broken off"):
        load(device="cuda", gpu_experts=7)
    monkeypatch.setattr(CapturedGraphs, "_run", run)
    load(device="cuda", gpu_experts=7)


def test_the_timeline_has_spans_of_the_gpu_and_the_cpu():
    tracer = GpuTracer()
    engine = load(device="cuda", gpu_experts=7, recorder=tracer, missing="stream")
    engine.generate(PROMPTS[0], GREEDY, 8)
    tracer.clear()
    done = len(tracer.spans())
    begun = time.perf_counter()
    engine.generate(PROMPTS[0], GREEDY, 8)
    ended = time.perf_counter()
    spans = tracer.spans()[done:]
    kinds = ("dense", "copy", "experts")
    on_gpu = {name: [span for span in spans if (span.place, span.name) == ("GPU", name)] for name in kinds}
    for name, spans_of_kind in on_gpu.items():
        assert len(spans_of_kind) >= 8, name
        assert all(begun - 1e-3 <= span.begun <= span.ended <= ended + 1e-3 for span in spans_of_kind), name
    moved = sum(span.nbytes for span in on_gpu["copy"])
    assert moved == sum(span.nbytes for span in spans if (span.place, span.name) == ("CPU", "copy")) > 0
    busy = sum(span.ended - span.begun for span in spans if span.place == "GPU" or span.name == "experts")
    assert ended - begun - busy <= tracer.idle(begun, ended) < ended - begun
