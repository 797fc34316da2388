"""The timeline: what of a stretch of time was idle."""

from __future__ import annotations

import random
import time

import pytest

from fiddler.telemetry.timeline import Span, Tracer

KINDS = [("experts", "CPU"), ("dense", "CPU"), ("wait", "CPU"), ("link", "CPU"), ("link", "GPU"), ("experts", "GPU")]


class Given(Tracer):
    """A timeline of these spans."""

    def __init__(self, spans):
        super().__init__()
        self.given = spans

    def spans(self):
        return self.given


def counted(spans, begin, end):
    """Millisecond by millisecond."""
    works = [span for span in spans if span.place == "GPU" or span.name in ("experts", "dense")]
    return sum(not any(span.begun <= t < span.ended for span in works) for t in range(begin, end))


@pytest.mark.parametrize("seed", range(20))
def test_idle_is_what_no_work_covers(seed):
    numbers = random.Random(seed)
    spans = []
    for _ in range(numbers.randrange(12)):
        (name, place), begun = numbers.choice(KINDS), numbers.randrange(80)
        spans.append(Span(name, begun, begun + numbers.randrange(25), 0, place, 0))
    begin, end = 10, 70
    assert Given(spans).idle(begin, end) == counted(spans, begin, end)


def test_what_a_thread_did_is_on_the_timeline():
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
