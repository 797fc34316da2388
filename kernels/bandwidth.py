"""Measures this machine's memory read bandwidth, the upper bound of every mat-vec. Knows nothing of weights."""

from __future__ import annotations

import time

import numpy as np
from numba import prange

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.machine.threads import one_caller

__all__ = ["read_bandwidth"]

_WORDS = 1 << 16  # words of 8 bytes a task: half a megabyte, long enough for the hardware prefetchers


def read_bandwidth(data: np.ndarray, repetitions: int = 5) -> float:
    """Bandwidth of the fastest of several streaming reads of `data` on all threads [bytes/s].

    data: a contiguous array whose pages are mapped already, preferably several times the last-level cache.
    Raises ValueError for an array smaller than one task.
    """
    words = data.reshape(-1).view(np.uint8)[: data.nbytes // 8 * 8].view(np.uint64)
    if words.size < _WORDS:
        raise ValueError(f"{data.nbytes} bytes are too few to measure; give at least {8 * _WORDS}")
    best = 0.0
    with one_caller():
        for _ in range(repetitions):
            started = time.perf_counter()
            _sum(words)
            best = max(best, words.nbytes / (time.perf_counter() - started))
    return best


@kernel
def _sum(words: np.ndarray) -> np.uint64:
    """Sum of the words in wrapping 64-bit arithmetic: only loads and additions."""
    total = np.uint64(0)
    for task in prange((words.size + _WORDS - 1) // _WORDS):
        piece = words[task * _WORDS : task * _WORDS + _WORDS]
        part = np.uint64(0)
        for i in range(piece.size):
            part += piece[i]
        total += part
    return total
