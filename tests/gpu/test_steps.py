"""What needs a GPU: steps that are broken off, several sequences' steps, and their timeline."""

from __future__ import annotations

import _thread
import random
import threading
import time

import pytest
import torch

import fiddler
from fiddler.device import cuda_driver
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
def cpu():
    return load(device="cpu", precision="exact")


@pytest.fixture(scope="module", params=["no residents", "residents", "a driver that cannot wait"])
def hybrid(request):
    with pytest.MonkeyPatch.context() as patched:
        if request.param == "a driver that cannot wait":  # then the side thread does
            patched.setattr(cuda_driver, "wait_for_value", lambda *given: False)
        return load(device="cuda", precision="exact", gpu_experts=0 if request.param == "no residents" else 7)


def texts(engine):
    return [engine.generate(prompt, GREEDY, 24).text for prompt in PROMPTS]


def test_after_a_step_that_failed_the_next_one_is_right(cpu, hybrid, monkeypatch):
    orchestrator, expected = hybrid.runner.model.experts, texts(cpu)
    ours = orchestrator.on_cpu
    for broken in (0, 1, 5, 12):
        left = broken

        def fails(*given):
            nonlocal left
            left -= 1
            if left < 0:
                raise ValueError("broken off")
            return ours(*given)

        monkeypatch.setattr(orchestrator, "on_cpu", fails)
        with pytest.raises(ValueError, match="broken off"):
            hybrid.generate(PROMPTS[0], GREEDY, 60)
        monkeypatch.setattr(orchestrator, "on_cpu", ours)
        assert hybrid.generate(PROMPTS[0], GREEDY, 24).text == expected[0]


def test_after_an_interrupted_step_the_next_one_is_right(cpu, hybrid):
    expected, numbers = texts(cpu), random.Random(0)
    for _ in range(25):
        timer = threading.Timer(0.001 + 0.1 * numbers.random(), _thread.interrupt_main)

        def go_on(timer=timer):
            timer.start()
            while True:
                hybrid.generate(PROMPTS[2], GREEDY, 60)

        with pytest.raises(KeyboardInterrupt):
            go_on()
        timer.join()
        assert hybrid.generate(PROMPTS[0], GREEDY, 24).text == expected[0]


@pytest.mark.parametrize("width", [None, 2, 3])
def test_in_a_batch_each_is_what_it_is_alone(cpu, hybrid, width):
    expected = texts(cpu)
    assert texts(hybrid) == expected
    found = dict(hybrid.batch([hybrid.start(prompt, GREEDY, 24) for prompt in PROMPTS], width))
    assert [found[i].text for i in range(len(PROMPTS))] == expected


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_those_of_the_cpu(cpu, hybrid, beams):
    for prompt in PROMPTS[:3]:
        ours, theirs = ([(beam.tokens, beam.score) for beam in e.beam_search(prompt, beams, 12)] for e in (hybrid, cpu))
        assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-3)


def test_what_is_kept_of_a_sequence_is_used_again(cpu, hybrid):
    begun = hybrid.generate(PROMPTS[2], GREEDY, 12, reuse=True)
    longer = PROMPTS[2] + begun.text + " and then"
    again = hybrid.generate(longer, GREEDY, 12, reuse=True)
    assert again.stats.cached_tokens > 20
    assert again.text == cpu.generate(longer, GREEDY, 12).text


def test_a_broken_step_leaves_no_garbage_that_holds_the_sequence(cpu, hybrid, no_collection, monkeypatch):
    """A batch would begin without the memory of the one sequence that is there already, and leave it unused."""
    monkeypatch.setattr(hybrid.runner.model.experts, "on_cpu", lambda *given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        hybrid.generate(PROMPTS[0], GREEDY, 60)
    monkeypatch.undo()
    assert len(dict(hybrid.batch([hybrid.start(prompt, GREEDY, 24) for prompt in PROMPTS], 2))) == len(PROMPTS)
    hybrid.generate(PROMPTS[2], GREEDY, 24)
    again = hybrid.generate(PROMPTS[2], GREEDY, 24, reuse=True)
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert again.text == cpu.generate(PROMPTS[2], GREEDY, 24).text


def test_garbage_is_left_alone_while_graphs_are_captured(cpu, monkeypatch):
    """Another engine's pinned memory, of which the driver ends a capture when it is freed."""
    from fiddler.gpu.decode_graphs import DecodeGraphs

    waste, run, captured = [load(device="cuda", precision="exact", gpu_experts=7)], DecodeGraphs._run, 0

    def runs(self, *given):
        nonlocal captured
        if torch.cuda.is_current_stream_capturing():
            captured += 1
            if waste:
                cycle = [waste.pop()]
                cycle.append(cycle)
            many = [[] for _ in range(100_000)]  # of which a collection would come
            assert len(many) == 100_000
        return run(self, *given)

    monkeypatch.setattr(DecodeGraphs, "_run", runs)
    engine = load(device="cuda", precision="exact", gpu_experts=7)
    assert captured
    assert texts(engine) == texts(cpu)


def test_a_capture_that_fails_is_an_error(monkeypatch):
    """And not the end of the process; the next one succeeds."""
    from fiddler.gpu.decode_graphs import DecodeGraphs

    run = DecodeGraphs._run

    def fails(self, *given):
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("broken off")
        return run(self, *given)

    monkeypatch.setattr(DecodeGraphs, "_run", fails)
    with pytest.raises(ValueError, match="broken off"):
        load(device="cuda", gpu_experts=7)
    monkeypatch.setattr(DecodeGraphs, "_run", run)
    load(device="cuda", gpu_experts=7)


def test_the_timeline_has_both_sides():
    tracer = GpuTracer()
    engine = load(device="cuda", gpu_experts=7, recorder=tracer, missing="stream")
    engine.generate(PROMPTS[0], GREEDY, 8)
    tracer.clear()
    done = len(tracer.spans())
    begun = time.perf_counter()
    engine.generate(PROMPTS[0], GREEDY, 8)
    ended = time.perf_counter()
    spans = tracer.spans()[done:]
    kinds = ("dense", "link", "experts")
    on_gpu = {name: [span for span in spans if (span.place, span.name) == ("GPU", name)] for name in kinds}
    for name, found in on_gpu.items():
        assert len(found) >= 8, name
        assert all(begun - 1e-3 <= span.begun <= span.ended <= ended + 1e-3 for span in found), name
    moved = sum(span.nbytes for span in on_gpu["link"])
    assert moved == sum(span.nbytes for span in spans if (span.place, span.name) == ("CPU", "link")) > 0
    busy = sum(span.ended - span.begun for span in spans if span.place == "GPU" or span.name == "experts")
    assert ended - begun - busy <= tracer.idle(begun, ended) < ended - begun
