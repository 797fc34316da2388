"""A worker thread beside the caller's: tasks in order, and steps that both threads compute. Knows no model.

A step passes tens of parts to the other thread. Each costs a few microseconds here, and twenty as an executor's future.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from fiddler.device.semaphore import HostSemaphore, Semaphore

__all__ = ["CooperativeStep", "Task", "WorkerThread"]

_POLL_SECONDS = 1e-3

Part = TypeVar("Part")
Result = TypeVar("Result")


class Task:
    """A call for a `WorkerThread`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._lock = threading.Lock()
        self._lock.acquire()
        self._error: BaseException | None = None
        self.ended = False

    def run(self) -> None:
        """Make the call; `wait` raises its exception."""
        call, self._call = self._call, None  # frees the objects that the call refers to
        if call is None:
            return
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - `wait` raises it
            self._error = error
        self.ended = True
        self._lock.release()

    def join(self, seconds: float = -1) -> None:
        """Wait until the call has returned or raised, or for so many seconds."""
        if not self.ended:  # a caller that was interrupted here may join again
            self._lock.acquire(timeout=seconds)

    def wait(self) -> None:
        """Wait until the call has returned. Raises its exception."""
        self.join()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame

    def forget(self) -> None:
        """Drop the call's exception, which nobody waits for, and all objects that its traceback refers to."""
        self._error = None


class WorkerThread:
    """Runs tasks, one after the other; the thread ends with the last reference to this object."""

    def __init__(self, name: str, setup: Callable[[], None] = lambda: None) -> None:
        """setup: runs on the thread before all tasks."""
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        threading.Thread(target=_run_tasks, args=(self._tasks, setup), name=name, daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def take(self, task: Task) -> None:
        """Queue a task after all earlier ones. A task that is queued twice runs once."""
        if not task.ended:
            self._tasks.put(task)


def _run_tasks(tasks: SimpleQueue[Task | None], setup: Callable[[], None]) -> None:
    setup()
    while (task := tasks.get()) is not None:
        task.run()
        del task  # while idle, refer neither to the task nor to its exception


class CooperativeStep(Generic[Part]):
    """A step on the worker thread that leaves parts of it to the caller's thread and waits for them at a semaphore."""

    def __init__(self, worker: WorkerThread, semaphore: Semaphore) -> None:
        self._worker, self._semaphore, self._done = worker, semaphore, HostSemaphore()
        self._parts: SimpleQueue[tuple[Part, int] | None] = SimpleQueue()  # None when the step is over
        self._task: Task | None = None
        self.stopping = False  # the worker thread may give up: nobody waits for the step

    @property
    def running(self) -> bool:
        """Whether the worker thread is within a step."""
        return self._task is not None and not self._task.ended

    def run(self, step: Callable[[], Result], do: Callable[[Part], None]) -> Result:
        """Return the result of `step`, run on the worker thread. do: computes a part that the step leaves to this one.

        Raises an exception of either when both have ended; where both raise, that of `do`.
        """
        results: list[Result] = []
        self.stop()
        parts = self._parts

        def run() -> None:
            try:
                results.append(step())
            finally:
                parts.put(None)

        part_error: Exception | None = None
        try:
            task = self.begin(run)
            while (item := parts.get()) is not None:
                part, number = item
                try:
                    if part_error is None:
                        do(part)
                except Exception as error:  # noqa: BLE001 - raised below
                    part_error = error
                finally:
                    self.open(number)
            if part_error is not None:  # first: the step's exception may be its consequence
                raise part_error
            task.wait()
            return results[0]
        finally:
            del part_error  # as in `Task.wait`
            self.stop()

    def begin(self, step: Callable[[], None]) -> Task:
        """Start work on the worker thread that leaves no parts; a step may have several, one after the other."""
        self._task = task = Task(step)
        self._worker.take(task)
        return task

    def leave(self, part: Part) -> int:
        """On the worker thread: leave `part` to the caller's; return the number of the wait that it ends."""
        number = self.number()
        self._parts.put((part, number))
        return number

    def number(self) -> int:
        """The number of the next wait, of the semaphore and of `rest`. Only the thread that plans may call it."""
        number = self._semaphore.next()
        self._done.numbered = number
        return number

    def rest(self) -> None:
        """On the worker thread: sleep, without keeping a core busy, until all parts that have a number are done."""
        self._done.wait(self._done.numbered)

    def open(self, number: int | None) -> None:
        """Release wait `number` and all before it; None: all waits."""
        self._semaphore.open(number)
        self._done.open(number)

    def stop(self) -> None:
        """End the step that was begun. Parts that an interrupted caller has not computed are skipped.

        A caller that is interrupted in this method calls it again.
        """
        if self._task is not None:
            self.stopping = True
            self._worker.take(self._task)  # again, in case the caller was interrupted before queueing it
            while not self._task.ended:
                self.open(None)  # again and again: the worker thread may take more numbers
                self._task.join(_POLL_SECONDS)
            self._task.forget()
            self.open(None)  # it may have taken a number without waiting for it
        self._task, self.stopping, self._parts = None, False, SimpleQueue()
