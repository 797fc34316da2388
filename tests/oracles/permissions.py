"""Lets root be refused what the permissions of a file refuse to others, so that tests of that run as root, too."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_CAPBSET_DROP = 24  # prctl

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def permissions_count() -> Iterator[None]:
    """This thread has no right to read and write whatever it likes, until the end."""
    header, before = (ctypes.c_uint32 * 2)(_VERSION, 0), (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, before))
    fewer = (ctypes.c_uint32 * 6)(*before)
    fewer[0] &= ~_OVERRIDES  # of the effective ones; it stays permitted to take them back
    _check(_libc.capset(header, fewer))
    try:
        yield
    finally:
        _check(_libc.capset(header, before))


def permissions_count_for_ever() -> None:
    """As a `preexec_fn`: for the program that is started."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            _check(_libc.prctl(_CAPBSET_DROP, capability, 0, 0, 0))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
