"""How many threads the kernels run on, and in which threading layer. Knows nothing of weights or arrays."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numba

from fiddler.errors import RequestError

__all__ = ["one_caller", "set_threads", "thread_count", "threading_layer", "threads_for", "usable_cores"]

_PARALLEL_FROM = 1 << 21  # multiplications: some 0.1 ms on one core, less than a late thread may keep it waiting
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_calling = threading.RLock()
_here = threading.local()


def usable_cores() -> int:
    """Physical cores among the CPUs this process may run on, at most what its control group is granted.

    Two hardware threads of a core share its multipliers and its path to memory: a second one only gets in the way.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_text(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    quota, _, period = _text(_QUOTA).partition(" ")
    granted = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else len(siblings)
    return max(1, min(len(siblings), granted))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def set_threads(threads: int | None) -> int:
    """Run the kernels on `threads` threads (None: every physical core this process may use); returns the number set.

    Raises RequestError outside 1..the number Numba was started with (`NUMBA_NUM_THREADS`).
    """
    most = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        threads = min(usable_cores(), most)
    if not 1 <= threads <= most:
        raise RequestError(f"{threads} threads: this machine runs 1 to {most}; change -t/--threads")
    _set(threads)
    return threads


def thread_count() -> int:
    """Threads the kernels run on, called from this thread."""
    count: int | None = getattr(_here, "threads", None)
    if count is None:
        count = _here.threads = int(numba.get_num_threads())
    return count


def _set(threads: int) -> None:
    """Numba's own functions take a lock of several processes each time, which is slow where caches are cold."""
    if threads != thread_count():
        _here.threads = None  # Numba is asked again, should this be interrupted
        numba.set_num_threads(threads)
        _here.threads = threads


def threading_layer() -> str | None:
    """Numba's threading layer ("omp", "tbb", "workqueue"); None before a kernel ran."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


@contextmanager
def threads_for(multiplications: int) -> Iterator[int]:
    """The number of threads for so much work, set for what is inside.

    One if it is little: on a busy machine, waiting for the others costs more.
    """
    threads = thread_count()
    with one_caller():
        if multiplications >= _PARALLEL_FROM or threads == 1:
            yield threads
            return
        _set(1)
        try:
            yield 1
        finally:
            _set(threads)


def one_caller() -> AbstractContextManager[object]:
    """Held while a kernel runs: no second thread calls one meanwhile.

    Numba's own thread pool ("workqueue"), which is what is left where the system has no OpenMP library, ends the
    process when two threads use it at once; and two callers of OpenMP would have two pools on the same cores.
    """
    return _calling
