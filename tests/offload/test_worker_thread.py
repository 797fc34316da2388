"""The thread beside the caller's: order, exceptions, interruptions, its end."""

from __future__ import annotations

import _thread
import gc
import random
import threading
import time
import weakref

import pytest

from fiddler.device.semaphore import HostSemaphore
from fiddler.offload.worker_thread import CooperativeStep, Task, WorkerThread


class Held:
    """What a task is about."""


def given(side, call):
    task = Task(call)
    side.take(task)
    return task


def test_everything_is_done_in_order_by_one_thread():
    begun, done = [], []
    side = WorkerThread("side", lambda: begun.append(threading.current_thread().name))
    tasks = [given(side, lambda i=i: done.append((i, threading.current_thread().name))) for i in range(100)]
    tasks[-1].wait()
    assert done == [(i, "side") for i in range(100)]
    assert begun == ["side"]
    for task in tasks:
        task.wait()


def test_an_exception_is_raised_where_it_is_waited_for_and_the_thread_goes_on():
    side, done = WorkerThread("side"), []
    failed, fine = given(side, lambda: 1 // 0), given(side, lambda: done.append(1))
    failed.join()
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    fine.wait()
    assert done == [1]


def test_one_who_was_interrupted_may_wait_again():
    side, go = WorkerThread("side"), threading.Event()
    task = given(side, lambda: go.wait(60) and None)
    waiting = threading.Thread(target=task.join)
    waiting.start()
    go.set()
    waiting.join(60)
    task.join()
    task.wait()


def test_the_thread_ends_and_nothing_is_kept():
    held, side = Held(), WorkerThread("a side of its own")
    seen = weakref.ref(held)
    task = given(side, lambda held=held: None)
    task.wait()
    del held
    gc.collect()
    assert seen() is None
    del side
    gc.collect()
    for _ in range(600):
        if not any(thread.name == "a side of its own" for thread in threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("the thread goes on without an owner")


@pytest.fixture
def semaphore():
    return HostSemaphore()


def test_a_step_leaves_parts_to_its_caller_and_waits_for_them(semaphore):
    shared, done = CooperativeStep(WorkerThread("side"), semaphore), []

    def step():
        total = 0
        for part in range(20):
            semaphore.wait(shared.leave(part))
            total += done[-1][0]
        return total, threading.current_thread().name

    assert shared.run(step, lambda part: done.append((part, threading.current_thread()))) == (190, "side")
    assert done == [(part, threading.current_thread()) for part in range(20)]
    assert not shared.running


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_part_that_fails_ends_the_step_and_the_next_one_is_whole(semaphore, error):
    shared, passed = CooperativeStep(WorkerThread("side"), semaphore), []

    def step():
        for part in range(5):
            semaphore.wait(shared.leave(part))
            passed.append(part)
        return passed

    def fail(part):
        if part == 2:
            raise error(f"part {part}")

    with pytest.raises(error, match="part 2"):
        shared.run(step, fail)
    assert passed == [0, 1, 2, 3, 4]  # nobody is left waiting
    passed.clear()
    assert shared.run(step, lambda part: None) == [0, 1, 2, 3, 4]


def test_a_step_that_fails_itself_raises_to_its_caller(semaphore):
    shared, done = CooperativeStep(WorkerThread("side"), semaphore), []

    def step():
        semaphore.wait(shared.leave("one part"))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        shared.run(step, done.append)
    assert done == ["one part"]
    assert shared.run(lambda: 7, done.append) == 7


class Interrupted(WorkerThread):
    """Ctrl-C before the first task is given."""

    def take(self, task):
        if not hasattr(self, "once"):
            self.once = True
            raise KeyboardInterrupt
        super().take(task)


def test_a_step_that_was_not_given_yet_can_be_interrupted(semaphore):
    shared, done = CooperativeStep(Interrupted("side"), semaphore), []

    def step():
        semaphore.wait(shared.leave(1))
        return 5

    with pytest.raises(KeyboardInterrupt):
        shared.run(step, done.append)
    assert not shared.running
    assert shared.run(step, done.append) == 5
    assert done == [1]


def test_a_number_that_nobody_waited_for_keeps_nobody_waiting(semaphore):
    shared, asked = CooperativeStep(WorkerThread("side"), semaphore), threading.Event()

    def stops():
        while not shared.stopping:
            time.sleep(1e-4)
        time.sleep(0.01)  # all numbers so far are open by now
        shared.number()
        asked.set()

    shared.begin(stops)
    shared.stop()
    assert asked.is_set()
    assert shared.run(lambda: shared.rest() or "whole", lambda part: None) == "whole"


def test_one_who_was_interrupted_while_a_step_ended_may_end_it_again(semaphore, monkeypatch):
    shared, join = CooperativeStep(WorkerThread("side"), semaphore), Task.join

    def step():
        for part in range(5):
            semaphore.wait(shared.leave(part))
            time.sleep(0.01)

    def again(task, seconds=-1):
        monkeypatch.setattr(Task, "join", join)
        raise KeyboardInterrupt

    def first(part):
        monkeypatch.setattr(Task, "join", again)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shared.run(step, first)
    assert shared.running
    assert shared.stopping
    shared.stop()
    assert not shared.running
    assert shared.run(lambda: shared.rest() or "whole", lambda part: None) == "whole"


def test_ctrl_c_at_any_moment_leaves_nothing_waiting(semaphore):
    """A hundred of them, in steps of many small parts."""
    shared, numbers, interrupted = CooperativeStep(WorkerThread("side"), semaphore), random.Random(0), 0

    def step():
        for part in range(20):
            number = shared.leave(part)
            shared.rest() if part % 2 else semaphore.wait(number)
        return "whole"

    while interrupted < 100:
        timer = threading.Timer(1e-4 + 3e-3 * numbers.random(), _thread.interrupt_main)
        try:
            timer.start()
            while timer.is_alive():
                assert shared.run(step, lambda part: None) == "whole"
            time.sleep(1)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert shared.run(step, lambda part: None) == "whole"


def test_what_failed_is_not_kept_either(no_collection):
    def fail(held):
        raise ValueError

    side, held = WorkerThread("side"), Held()
    seen = weakref.ref(held)
    with pytest.raises(ValueError):
        given(side, lambda held=held: fail(held)).wait()
    given(side, lambda: None).wait()
    del held
    assert seen() is None


@pytest.mark.parametrize(
    "broken, raised",
    [
        ({"step"}, RuntimeError),
        ({"part"}, ValueError),
        ({"part", "step"}, ValueError),
        ({"caller", "step"}, KeyboardInterrupt),  # what the step raises is for nobody then
        ({"part", "gate"}, KeyboardInterrupt),
    ],
)
def test_what_a_broken_step_was_about_is_free_at_once(semaphore, no_collection, monkeypatch, broken, raised):
    """On a GPU that is a sequence's memory, and nothing says when garbage is collected."""
    shared, held, opens = CooperativeStep(WorkerThread("side"), semaphore), Held(), semaphore.open
    seen = weakref.ref(held)

    def step(held):
        semaphore.wait(shared.leave("part"))
        if "step" in broken:
            raise RuntimeError

    def do(part):
        if "part" in broken:
            raise ValueError
        if "caller" in broken:
            raise KeyboardInterrupt

    def interrupted(number=None):
        if number is not None:
            raise KeyboardInterrupt
        opens()

    if "gate" in broken:
        monkeypatch.setattr(semaphore, "open", interrupted)
    with pytest.raises(raised):
        shared.run(lambda held=held: step(held), do)
    monkeypatch.undo()
    assert shared.run(lambda: 7, do) == 7
    del held
    assert seen() is None
