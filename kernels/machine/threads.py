"""The kernels' number of threads and threading layer. Knows nothing of weights or arrays."""

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

_PARALLEL_FROM = 1 << 21  # multiplications: some 0.1 ms on one core, less than the wait for a late thread
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_kernel_lock = threading.RLock()
_thread_state = threading.local()


def usable_cores() -> int:
    """Physical cores among the CPUs that this process may run on, at most its control group's CPU quota.

    Hardware threads do not count: the two of a core share its multipliers and its path to memory.
    """
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = {_text(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in cpus}
    quota, _, period = _text(_QUOTA).partition(" ")
    quota_cores = math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else len(siblings)
    return max(1, min(len(siblings), quota_cores))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def set_threads(threads: int | None) -> int:
    """Run the kernels on `threads` threads (None: every physical core that this process may use); returns that number.

    Raises RequestError outside 1..the number Numba was started with (`NUMBA_NUM_THREADS`).
    """
    max_threads = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        threads = min(usable_cores(), max_threads)
    if not 1 <= threads <= max_threads:
        raise RequestError(f"{threads} threads: this machine runs 1 to {max_threads}; change -t/--threads")
    _set(threads)
    return threads


def thread_count() -> int:
    """Number of threads of the kernels that this thread calls."""
    count: int | None = getattr(_thread_state, "threads", None)
    if count is None:
        count = _thread_state.threads = int(numba.get_num_threads())
    return count


def _set(threads: int) -> None:
    """Set Numba's number only if it changes: Numba takes an inter-process lock, which is slow with cold caches."""
    if threads != thread_count():
        _thread_state.threads = None  # unknown until set: after an interruption `thread_count` asks Numba
        numba.set_num_threads(threads)
        _thread_state.threads = threads


def threading_layer() -> str | None:
    """Numba's threading layer ("omp", "tbb", "workqueue"); None before the first kernel has run."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


@contextmanager
def threads_for(multiplications: int) -> Iterator[int]:
    """Set and yield the number of threads for a kernel with this many multiplications, inside the context.

    One thread for a small kernel: on a busy machine, waiting for the other threads costs more.
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
    """The lock that a caller holds while a kernel runs: only one thread calls kernels at a time.

    Numba's own thread pool ("workqueue", the fallback on systems without an OpenMP library) ends the process when two
    threads use it at once; two callers of OpenMP would have two thread pools on the same cores.
    """
    return _kernel_lock
