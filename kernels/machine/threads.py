"""The kernels' number of threads and threading layer. Knows nothing of weights or arrays."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numba

from fiddler.errors import RequestError, ResourceError, quoted

__all__ = [
    "check_process",
    "end_with_parent",
    "is_parallel",
    "one_caller",
    "set_threads",
    "thread_count",
    "threading_layer",
    "threads_for",
    "usable_cores",
]

_PR_SET_PDEATHSIG = 1  # Linux, include/uapi/linux/prctl.h
_PARALLEL_FROM = 1 << 21  # multiplications: some 0.1 ms on one core, less than the wait for a late thread
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")

_kernel_lock = threading.RLock()
_thread_state = threading.local()
_threads_lost: list[bool] = []  # not empty in a child that was forked from a process with kernel threads


def _after_fork() -> None:
    if threading_layer() is not None:
        _threads_lost.append(True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def check_process() -> None:
    """Raise ResourceError in a forked child: the kernels' threads are its parent's, and OpenMP would end the child."""
    if _threads_lost:
        raise ResourceError(
            "this process was forked from one that runs kernels, and has none of their threads; start it with "
            "multiprocessing.get_context('spawn'), or load the model in the child only"
        )


def end_with_parent(parent: int) -> None:
    """Have Linux end this process when the thread that started it ends; at once if its process `parent` has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            signal.raise_signal(signal.SIGKILL)


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

    Raises RequestError outside 1..the number Numba was started with (`NUMBA_NUM_THREADS`), ResourceError in a forked
    process (see `check_process`).
    """
    check_process()
    max_threads = int(numba.config.NUMBA_NUM_THREADS)
    if threads is None:
        threads = min(usable_cores(), max_threads)
    if not 1 <= threads <= max_threads:
        raise RequestError(f"{threads} threads: this machine runs 1 to {max_threads}; change -t/--threads")
    _set(threads)
    return threads


def thread_count() -> int:
    """Number of threads of the kernels that this thread calls.

    Raises RequestError where the threading layer that the environment names is not there.
    """
    count: int | None = getattr(_thread_state, "threads", None)
    if count is None:
        try:
            count = _thread_state.threads = int(numba.get_num_threads())  # starts the threads, the first time
        except ValueError as error:
            layer, reason = quoted(numba.config.THREADING_LAYER), " ".join(str(error).split())
            raise RequestError(f"NUMBA_THREADING_LAYER is {layer}: {reason}; unset it") from None
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


def is_parallel(multiplications: int) -> bool:
    """Whether a kernel with so many multiplications is worth all threads."""
    return multiplications >= _PARALLEL_FROM


@contextmanager
def threads_for(multiplications: int) -> Iterator[int]:
    """Set and yield the number of threads for a kernel with this many multiplications, inside the context.

    One thread for a small kernel: on a busy machine, waiting for the other threads costs more.
    """
    threads = thread_count()
    with one_caller():
        if threads == 1 or is_parallel(multiplications):
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
