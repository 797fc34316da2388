"""The worker thread: order of tasks, exceptions, interruptions and its end."""

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


class Payload:
    """An object that a task refers to."""


def submit(worker, call):
    task = Task(call)
    worker.take(task)
    return task


def test_tasks_run_in_order_on_one_thread():
    begun, done = [], []
    worker = WorkerThread("worker", lambda: begun.append(threading.current_thread().name))
    tasks = [submit(worker, lambda i=i: done.append((i, threading.current_thread().name))) for i in range(100)]
    tasks[-1].wait()
    assert done == [(i, "worker") for i in range(100)]
    assert begun == ["worker"]
    for task in tasks:
        task.wait()


def test_an_exception_of_a_task_is_raised_to_its_waiter_and_the_thread_goes_on():
    worker, done = WorkerThread("worker"), []
    failed, fine = submit(worker, lambda: 1 // 0), submit(worker, lambda: done.append(1))
    failed.join()
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    fine.wait()
    assert done == [1]


def test_a_task_may_be_joined_again_once_it_is_done():
    worker, go = WorkerThread("worker"), threading.Event()
    task = submit(worker, lambda: go.wait(60) and None)
    waiting = threading.Thread(target=task.join)
    waiting.start()
    go.set()
    waiting.join(60)
    task.join()
    task.wait()


def test_the_thread_ends_with_its_owner_and_holds_no_task():
    payload, worker = Payload(), WorkerThread("its own worker")
    reference = weakref.ref(payload)
    task = submit(worker, lambda payload=payload: None)
    task.wait()
    del payload
    gc.collect()
    assert reference() is None
    del worker
    gc.collect()
    for _ in range(600):
        if not any(thread.name == "its own worker" for thread in threading.enumerate()):
            return
        time.sleep(0.01)
    pytest.fail("the thread goes on without an owner")


@pytest.fixture
def semaphore():
    return HostSemaphore()


def test_a_cooperative_step_leaves_parts_to_its_caller_and_waits_for_them(semaphore):
    cooperative, done = CooperativeStep(WorkerThread("worker"), semaphore), []

    def step():
        total = 0
        for part in range(20):
            semaphore.wait(cooperative.leave(part))
            total += done[-1][0]
        return total, threading.current_thread().name

    assert cooperative.run(step, lambda part: done.append((part, threading.current_thread()))) == (190, "worker")
    assert done == [(part, threading.current_thread()) for part in range(20)]
    assert not cooperative.running


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_part_is_raised_to_the_caller_and_the_next_step_is_whole(semaphore, error):
    cooperative, passed = CooperativeStep(WorkerThread("worker"), semaphore), []

    def step():
        for part in range(5):
            semaphore.wait(cooperative.leave(part))
            passed.append(part)
        return passed

    def fail(part):
        if part == 2:
            raise error(f"part {part}")

    with pytest.raises(error, match="part 2"):
        cooperative.run(step, fail)
    assert passed == [0, 1, 2, 3, 4]  # every wait of the step has ended
    passed.clear()
    assert cooperative.run(step, lambda part: None) == [0, 1, 2, 3, 4]


def test_a_failing_step_is_raised_to_the_caller_and_the_next_one_is_whole(semaphore):
    cooperative, done = CooperativeStep(WorkerThread("worker"), semaphore), []

    def step():
        semaphore.wait(cooperative.leave("one part"))
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        cooperative.run(step, done.append)
    assert done == ["one part"]
    assert cooperative.run(lambda: 7, done.append) == 7


class Interrupted(WorkerThread):
    """Ctrl-C before the first task is submitted."""

    def take(self, task):
        if not hasattr(self, "once"):
            self.once = True
            raise KeyboardInterrupt
        super().take(task)


def test_ctrl_c_before_a_step_is_submitted_leaves_the_next_one_whole(semaphore):
    cooperative, done = CooperativeStep(Interrupted("worker"), semaphore), []

    def step():
        semaphore.wait(cooperative.leave(1))
        return 5

    with pytest.raises(KeyboardInterrupt):
        cooperative.run(step, done.append)
    assert not cooperative.running
    assert cooperative.run(step, done.append) == 5
    assert done == [1]


def test_a_wait_numbered_while_stopping_does_not_block_the_next_step(semaphore):
    cooperative, numbered = CooperativeStep(WorkerThread("worker"), semaphore), threading.Event()

    def stops():
        while not cooperative.stopping:
            time.sleep(1e-4)
        time.sleep(0.01)  # all numbers so far are open by now
        cooperative.number()
        numbered.set()

    cooperative.begin(stops)
    cooperative.stop()
    assert numbered.is_set()
    assert cooperative.run(lambda: cooperative.rest() or "whole", lambda part: None) == "whole"


def test_a_stop_that_ctrl_c_interrupted_may_be_repeated(semaphore, monkeypatch):
    cooperative, join = CooperativeStep(WorkerThread("worker"), semaphore), Task.join

    def step():
        for part in range(5):
            semaphore.wait(cooperative.leave(part))
            time.sleep(0.01)

    def again(task, seconds=-1):
        monkeypatch.setattr(Task, "join", join)
        raise KeyboardInterrupt

    def first(part):
        monkeypatch.setattr(Task, "join", again)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cooperative.run(step, first)
    assert cooperative.running
    assert cooperative.stopping
    cooperative.stop()
    assert not cooperative.running
    assert cooperative.run(lambda: cooperative.rest() or "whole", lambda part: None) == "whole"


def test_ctrl_c_at_any_moment_leaves_no_thread_waiting(semaphore):
    """A hundred interruptions of steps with many small parts."""
    cooperative, numbers, interrupted = CooperativeStep(WorkerThread("worker"), semaphore), random.Random(0), 0

    def step():
        for part in range(20):
            number = cooperative.leave(part)
            cooperative.rest() if part % 2 else semaphore.wait(number)
        return "whole"

    while interrupted < 100:
        timer = threading.Timer(1e-4 + 3e-3 * numbers.random(), _thread.interrupt_main)
        try:
            timer.start()
            while timer.is_alive():
                assert cooperative.run(step, lambda part: None) == "whole"
            time.sleep(1)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert cooperative.run(step, lambda part: None) == "whole"


def test_the_thread_holds_no_task_that_failed(no_collection):
    def fail(payload):
        raise ValueError

    worker, payload = WorkerThread("worker"), Payload()
    reference = weakref.ref(payload)
    with pytest.raises(ValueError):
        submit(worker, lambda payload=payload: fail(payload)).wait()
    submit(worker, lambda: None).wait()
    del payload
    assert reference() is None


@pytest.mark.parametrize(
    "broken, raised",
    [
        ({"step"}, RuntimeError),
        ({"part"}, ValueError),
        ({"part", "step"}, ValueError),
        ({"caller", "step"}, KeyboardInterrupt),  # nobody waits for what the step raises then
        ({"part", "gate"}, KeyboardInterrupt),
    ],
)
def test_objects_of_an_aborted_step_are_freed_at_once(semaphore, no_collection, monkeypatch, broken, raised):
    """On a GPU such an object is a sequence's KV cache, and when garbage is collected is unknown."""
    cooperative, payload, real_open = CooperativeStep(WorkerThread("worker"), semaphore), Payload(), semaphore.open
    reference = weakref.ref(payload)

    def step(payload):
        semaphore.wait(cooperative.leave("part"))
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
        real_open()

    if "gate" in broken:
        monkeypatch.setattr(semaphore, "open", interrupted)
    with pytest.raises(raised):
        cooperative.run(lambda payload=payload: step(payload), do)
    monkeypatch.undo()
    assert cooperative.run(lambda: 7, do) == 7
    del payload
    assert reference() is None
