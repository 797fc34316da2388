"""How many threads the kernels run on, and in which threading layer. Knows nothing of weights or arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numba

from fiddler.errors import RequestError

__all__ = ["set_threads", "thread_count", "threading_layer", "threads_for"]

_PARALLEL_FROM = 1 << 21  # multiplications: some 0.1 ms on one core, less than a late thread may keep it waiting


def _usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> int:
    """Run the kernels on `threads` threads (None: every core this process may use); returns the number set.

    Raises RequestError outside 1..the number Numba was started with (`NUMBA_NUM_THREADS`).
    """
    most = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        threads = min(_usable_cores(), most)
    if not 1 <= threads <= most:
        raise RequestError(f"{threads} threads: this machine runs 1 to {most}; change -t/--threads")
    numba.set_num_threads(threads)
    return threads


def thread_count() -> int:
    """Threads the kernels run on."""
    return int(numba.get_num_threads())


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
    threads = numba.get_num_threads()
    if multiplications >= _PARALLEL_FROM or threads == 1:
        yield threads
        return
    numba.set_num_threads(1)
    try:
        yield 1
    finally:
        numba.set_num_threads(threads)
