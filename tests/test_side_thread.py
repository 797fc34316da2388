"""The thread beside the caller's: order, exceptions, interruptions, its end."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest

from fiddler.side_thread import SideThread


def test_everything_is_done_in_order_by_one_thread():
    begun, done = [], []
    side = SideThread("side", lambda: begun.append(threading.current_thread().name))
    tasks = [side.give(lambda i=i: done.append((i, threading.current_thread().name))) for i in range(100)]
    tasks[-1].wait()
    assert done == [(i, "side") for i in range(100)]
    assert begun == ["side"]
    for task in tasks:
        task.wait()


def test_an_exception_is_raised_where_it_is_waited_for_and_the_thread_goes_on():
    side, done = SideThread("side"), []
    failed, fine = side.give(lambda: 1 // 0), side.give(lambda: done.append(1))
    failed.join()
    with pytest.raises(ZeroDivisionError):
        failed.wait()
    fine.wait()
    assert done == [1]


def test_one_who_was_interrupted_may_wait_again():
    side, go = SideThread("side"), threading.Event()
    task = side.give(lambda: go.wait(60) and None)
    waiting = threading.Thread(target=task.join)
    waiting.start()
    go.set()
    waiting.join(60)
    task.join()
    task.wait()


def test_the_thread_ends_and_nothing_is_kept():
    class Held:
        pass

    held, side = Held(), SideThread("a side of its own")
    seen = weakref.ref(held)
    task = side.give(lambda held=held: None)
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
