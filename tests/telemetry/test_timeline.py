"""The timeline: the idle time of an interval, and the spans of a thread."""

from __future__ import annotations

import random
import time

import pytest

from fiddler.telemetry.timeline import Span, Tracer

KINDS = [("experts", "CPU"), ("dense", "CPU"), ("wait", "CPU"), ("copy", "CPU"), ("copy", "GPU"), ("experts", "GPU")]


class FixedTracer(Tracer):
    """A tracer that has these spans."""

    def __init__(self, spans):
        super().__init__()
        self.fixed_spans = spans

    def spans(self):
        return self.fixed_spans


def idle_by_counting(spans, begin, end):
    """Idle time, counted one unit of time after another."""
    work = [span for span in spans if span.place == "GPU" or span.name in ("experts", "dense")]
    return sum(not any(span.begun <= t < span.ended for span in work) for t in range(begin, end))


@pytest.mark.parametrize("seed", range(20))
def test_idle_time_is_the_time_that_no_work_covers(seed):
    numbers = random.Random(seed)
    spans = []
    for _ in range(numbers.randrange(12)):
        (name, place), begun = numbers.choice(KINDS), numbers.randrange(80)
        spans.append(Span(name, begun, begun + numbers.randrange(25), 0, place, 0))
    begin, end = 10, 70
    assert FixedTracer(spans).idle(begin, end) == idle_by_counting(spans, begin, end)


def test_spans_of_a_thread_are_on_the_timeline_and_in_its_chrome_trace():
    tracer = Tracer()
    begun = time.perf_counter()
    with tracer.span("experts", 12):
        time.sleep(0.02)
    with tracer.span("wait", 0):
        time.sleep(0.03)
    ended = time.perf_counter()
    first, second = tracer.spans()
    assert begun <= first.begun < first.ended <= second.begun < second.ended <= ended
    assert tracer.idle(begun, ended) == pytest.approx(ended - begun - (first.ended - first.begun))
    events = [event for event in tracer.to_chrome()["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["args"]["bytes"]) for event in events] == [("experts", 12), ("wait", 0)]
    assert events[0]["dur"] == pytest.approx((first.ended - first.begun) * 1e6)
