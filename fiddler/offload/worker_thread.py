"""One thread beside the caller's: work in order, a gate between the two, and a step that both do. Knows no model.

Steps, and tens of parts of each, are handed over: this costs a few microseconds, an executor's futures cost twenty.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from fiddler.device.semaphore import HostSemaphore, Semaphore

__all__ = ["CooperativeStep", "Task", "WorkerThread"]

_A_WHILE = 1e-3  # seconds

Part = TypeVar("Part")
Made = TypeVar("Made")


class Task:
    """Something that was given to a `WorkerThread`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._lock = threading.Lock()
        self._lock.acquire()
        self._failed: BaseException | None = None
        self.ended = False

    def run(self) -> None:
        """Do it; what it raises is kept for the one who waits."""
        call, self._call = self._call, None  # what it holds on to is not kept
        if call is None:
            return
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._failed = error
        self.ended = True
        self._lock.release()

    def join(self, seconds: float = -1) -> None:
        """Wait until it is over, however it went, or for so long."""
        if not self.ended:  # so that one who was interrupted here may come again
            self._lock.acquire(timeout=seconds)

    def wait(self) -> None:
        """Wait until it is done. Raises what it raised."""
        self.join()
        failed, self._failed = self._failed, None
        if failed is not None:
            try:
                raise failed
            finally:
                del failed  # its traceback holds on to this frame

    def forget(self) -> None:
        """What it raised is for nobody: let go of it, and of what the calls it went through held on to."""
        self._failed = None


class WorkerThread:
    """Does what it is given, one after the other; ends with its last owner."""

    def __init__(self, name: str, first: Callable[[], None] = lambda: None) -> None:
        """first: what it does before anything else."""
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._tasks, first), name=name, daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def take(self, task: Task) -> None:
        """Have it done as soon as all that was given before is. Given twice it is done once."""
        if not task.ended:
            self._tasks.put(task)


def _work(tasks: SimpleQueue[Task | None], first: Callable[[], None]) -> None:
    first()
    while (task := tasks.get()) is not None:
        task.run()
        del task  # nor what it raised, while there is nothing to do


class CooperativeStep(Generic[Part]):
    """Work on the side thread that leaves parts of it to the caller's, and goes on behind a gate when they are done."""

    def __init__(self, side: WorkerThread, semaphore: Semaphore) -> None:
        self._side, self._semaphore, self._done = side, semaphore, HostSemaphore()
        self._parts: SimpleQueue[tuple[Part, int] | None] = SimpleQueue()  # None when the step is over
        self._task: Task | None = None
        self.stopping = False  # what is done aside need not go on: nobody wants it any more

    @property
    def running(self) -> bool:
        """Whether the side thread is within a step."""
        return self._task is not None and not self._task.ended

    def run(self, step: Callable[[], Made], do: Callable[[Part], None]) -> Made:
        """What `step` returns, on the side thread. `do`: a part that it leaves to this one.

        Raises what either of them raises, when both have come to an end; where both do, what the part has raised.
        """
        made: list[Made] = []
        self.stop()
        parts = self._parts

        def run() -> None:
            try:
                made.append(step())
            finally:
                parts.put(None)

        failed: Exception | None = None
        try:
            task = self.begin(run)
            while (left := parts.get()) is not None:
                part, number = left
                try:
                    if failed is None:
                        do(part)
                except Exception as error:  # noqa: BLE001 - raised below
                    failed = error
                finally:
                    self.open(number)
            if failed is not None:  # what the step raises after that may come of it
                raise failed
            task.wait()
            return made[0]
        finally:
            del failed  # as in `Task.wait`
            self.stop()

    def begin(self, step: Callable[[], None]) -> Task:
        """Have a step done by the side thread whose parts, if any, the caller knows of otherwise."""
        self._task = task = Task(step)
        self._side.take(task)
        return task

    def leave(self, part: Part) -> int:
        """On the side thread: have the caller's do `part`; the number of the wait at the gate that this ends."""
        number = self.number()
        self._parts.put((part, number))
        return number

    def number(self) -> int:
        """On the side thread: the number of another wait at the gate, and of another `rest`."""
        number = self._semaphore.next()
        self._done.numbered = number
        return number

    def rest(self) -> None:
        """On the side thread: sleep until all parts are done, which does not keep a core busy."""
        self._done.wait(self._done.numbered)

    def open(self, number: int | None) -> None:
        """End the wait with this number and those before it; None: all."""
        self._semaphore.open(number)
        self._done.open(number)

    def stop(self) -> None:
        """Come to an end of what was begun; if the caller was interrupted, the parts left to it are not done.

        To be called again by one who was interrupted here, too.
        """
        if self._task is not None:
            self.stopping = True
            self._side.take(self._task)  # once more, where the caller was interrupted before that
            while not self._task.ended:
                self.open(None)  # again and again: the side thread may ask for more numbers
                self._task.join(_A_WHILE)
            self._task.forget()
            self.open(None)  # and may have asked for one for which it did not wait
        self._task, self.stopping, self._parts = None, False, SimpleQueue()
