"""Requests that arrive together share the first step of a server that was idle; one by itself is not held for long."""

from __future__ import annotations

import asyncio
import threading
import time
from statistics import median

import httpx
import pytest
from hypothesis import given, strategies as st

import fiddler
from fiddler.generation.events import Failed, Finished, Token
from fiddler.generation.request import Request
from fiddler.sampling.sampler import Sampling
from fiddler.serving.batching_delay import StepTimes, batching_delay
from fiddler.serving.worker import Worker
from tools.measure_server import served

LONGEST = 0.05  # [s] that the first request waits for others
NEW = 12


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(device="cpu")


class Receiver:
    """A worker's deliveries, and waits for the end of all texts."""

    def __init__(self, engine, parallel):
        self.deliveries, self.errors, self.ended = [], [], threading.Semaphore(0)
        self.worker = Worker(engine, self.deliver, self.errors.append, parallel)

    def __enter__(self):
        self.worker.start()
        return self

    def __exit__(self, *_):
        self.worker.close()
        assert not self.errors

    def deliver(self, deliveries):
        self.deliveries += deliveries
        for delivery in deliveries:
            if isinstance(delivery.event, Finished | Failed):
                self.ended.release()

    def wait(self, texts):
        for _ in range(texts):
            assert self.ended.acquire(timeout=60)

    def first_token(self, owner):
        """The time of its step's end."""
        return next(d.at for d in self.deliveries if d.owner == owner and isinstance(d.event, Token))


def request(prompt="Once upon a time"):
    return Request(prompt, Sampling(temperature=0.0), NEW, ignore_eos=True, reuse=False)


@pytest.mark.parametrize(
    ("expected", "waited", "quiet", "arriving", "seconds"),
    [
        (0.6, 0.0, 0.0, False, 0.005),  # a hundredth would be 6 ms: nobody else on the way for 5 ms
        (0.2, 0.0, 0.0, False, 0.002),
        (0.2, 0.010, 0.0005, False, 0.0015),
        (0.2, 0.019, 0.0, False, 0.001),  # a tenth of the step is over soon
        (0.2, 0.021, 0.0, True, -0.001),
        (0.2, 0.010, 0.010, True, 0.010),  # others are being read: silence does not count
        (0.002, 0.0, 0.0, False, 0.00002),
        (0.002, 0.0, 0.0, True, 0.005),
        (60.0, 0.0, 0.0, True, 0.05),
        (60.0, 0.0, 0.0, False, 0.005),
        (None, 0.0, 0.0, True, 0.05),  # before the first step
        (None, 0.0, 0.002, False, 0.003),
    ],
)
def test_batching_delay_is_a_tenth_of_the_step_and_a_hundredth_of_silence(expected, waited, quiet, arriving, seconds):
    assert batching_delay(expected, waited, quiet, arriving=arriving) == pytest.approx(seconds, abs=1e-12)


@given(st.floats(0, 10), st.floats(0, 1), st.lists(st.integers(1, 4096), min_size=1, max_size=20), st.integers(1, 4096))
def test_a_step_is_never_expected_to_take_longer_than_it_does(fixed, each, steps, tokens):
    times = StepTimes()
    assert times(tokens) is None
    for count in steps:
        times.took(count, fixed + each * count)
    assert times(tokens) <= (fixed + each * tokens) * (1 + 1e-9)
    assert times(steps[-1]) == pytest.approx(fixed + each * steps[-1])


def test_a_first_step_that_compiles_is_forgotten_with_the_next_one():
    times = StepTimes()
    times.took(416, 20.0)
    assert times(26) == pytest.approx(1.25)
    times.took(26, 0.027)
    assert times(26) == 0.027
    assert times(416) == pytest.approx(0.432)
    times.took(13, 0.05)  # a machine that was held up once: fewer tokens than 26 took longer
    assert (times(13), times(26)) == (0.05, 0.05)
    times.took(26, 0.027)
    assert (times(13), times(26)) == (0.027, 0.027)


def test_requests_that_arrive_together_share_all_steps(engine):
    """Each is submitted while the next ones are being read. A machine that is held up for 50 ms may spoil a try."""
    with Receiver(engine, parallel=16) as receiver:
        worker, steps = receiver.worker, []
        for _ in range(5):
            before = worker.counters.steps
            worker.expect(16)
            for number in range(16):
                worker.submit(number, [request()], 15 - number)
                time.sleep(0.0001)
            receiver.wait(16)
            steps.append(worker.counters.steps - before)
            if steps[-1] == NEW:
                break
    assert steps[-1] == NEW, steps


@pytest.mark.parametrize(("parallel", "most"), [(16, LONGEST), (1, 0.004)])
def test_a_request_that_never_comes_holds_another_one_for_50_ms_at_most_and_a_full_batch_not_at_all(
    engine, parallel, most
):
    with Receiver(engine, parallel) as receiver:
        receiver.worker.submit("warm", [request()])
        receiver.wait(1)
        alone, held = [], []
        for arriving, seconds in ((0, alone), (1, held)) * 5:
            receiver.worker.expect(arriving)
            begun, owner = time.perf_counter(), object()
            receiver.worker.submit(owner, [request()], arriving)
            receiver.wait(1)
            seconds.append(receiver.first_token(owner) - begun)
    assert min(held) < min(alone) + most


def test_a_request_is_cancelled_while_others_are_waited_for(engine):
    with Receiver(engine, parallel=16) as receiver:
        receiver.worker.expect(1)
        receiver.worker.submit("left", [request()], 1)
        receiver.worker.cancel("left")
        receiver.worker.submit("stays", [request()])
        receiver.wait(1)
        assert not any(isinstance(d.event, Token) for d in receiver.deliveries if d.owner == "left")
        assert receiver.worker.counters.finished == 1
        assert not receiver.worker.running


def test_a_worker_that_waits_for_others_closes_before_a_step(engine):
    with Receiver(engine, parallel=16) as receiver:
        receiver.worker.expect(1)
        receiver.worker.submit("one", [request()], 1)
        receiver.worker.close()
        assert not receiver.worker.alive
        assert receiver.worker.counters.steps == 0
        assert not receiver.worker.running


def steps_of(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(float(next(line.split()[1] for line in lines if line.startswith("llamacpp:n_decode_total "))))


def test_eight_clients_at_once_take_the_steps_of_one(server):
    """They send within a millisecond; a machine that is held up meanwhile may spoil a try, hardly five of nine."""
    fields = {"max_tokens": NEW, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    bodies = [{"prompt": f"{name} had a ball" * 5, **fields} for name in "ABCDEFGH"]
    steps = []
    for _ in range(9):
        before = steps_of(server.url)
        _, answers = asyncio.run(served(server.url, bodies, spread=0.0))
        assert [tokens for tokens, _ in answers] == [NEW] * 8
        steps.append(steps_of(server.url) - before)
    assert median(steps) == NEW, steps
