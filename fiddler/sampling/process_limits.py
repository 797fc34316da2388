"""Limits of this process while it works on a stranger's grammar: memory, CPU time. Knows no grammar."""

from __future__ import annotations

import resource
import signal

__all__ = ["end_on_timer", "limit_memory"]


def limit_memory(nbytes: int) -> None:
    """Let this process allocate `nbytes` more than it has now, and write no core file."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        address_space = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = address_space + nbytes if hard == resource.RLIM_INFINITY else min(address_space + nbytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def end_on_timer() -> None:
    """Let the signal of `ITIMER_PROF` end this process, in the middle of any computation."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
