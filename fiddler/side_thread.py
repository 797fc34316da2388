"""One thread beside the caller's, for work in order. Knows nothing of what it does.

Much of a step is handed over, tens of times a token: this costs a few microseconds, an executor's futures cost twenty.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["SideThread", "Task"]


class Task:
    """Something that was given to a `SideThread`."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call
        self._lock = threading.Lock()
        self._lock.acquire()
        self._failed: BaseException | None = None
        self._ended = False

    def run(self) -> None:
        """Do it; what it raises is kept for the one who waits."""
        call, self._call = self._call, None  # what it holds on to is not kept
        assert call is not None
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            self._failed = error
        self._ended = True
        self._lock.release()

    def join(self) -> None:
        """Wait until it is over, however it went."""
        if not self._ended:  # so that one who was interrupted here may come again
            self._lock.acquire()

    def wait(self) -> None:
        """Wait until it is done. Raises what it raised."""
        self.join()
        if self._failed is not None:
            raise self._failed


class SideThread:
    """Does what it is given, one after the other; ends with its last owner."""

    def __init__(self, name: str, first: Callable[[], None] = lambda: None) -> None:
        """first: what it does before anything else."""
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        threading.Thread(target=_work, args=(self._tasks, first), name=name, daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def give(self, call: Callable[[], None]) -> Task:
        """Have it done as soon as all that was given before is."""
        task = Task(call)
        self._tasks.put(task)
        return task


def _work(tasks: SimpleQueue[Task | None], first: Callable[[], None]) -> None:
    first()
    while (task := tasks.get()) is not None:
        task.run()
