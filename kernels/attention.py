"""Attention of one new position over a sequence's keys and values, which it joins: rotate, store, attend.

On one thread, for contexts of which attention is a small part. Knows arrays. Does not know sequences, layers or how
many positions there is room for beyond the arrays it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
from numba import njit, types
from numba.extending import overload

from fiddler.kernels.arithmetic import exponential, from_half, to_half
from fiddler.kernels.jit import FASTMATH, kernel

__all__ = ["attend_one"]

_OPTIONS = {"nogil": True, "boundscheck": False}


def attend_one(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    frequencies: np.ndarray,
    window: int | None = None,
) -> np.ndarray:
    """Grouped-query attention of the position `position` to itself and those before it: float32 [H, head_dim].

    q: float32 [H, head_dim]; k, v: float32 [G, head_dim]. keys, values: [G, capacity, head_dim], float32 or the uint16
    bits of float16, whose place `position` is written: k rotated, v as it is. frequencies: float32 [head_dim / 2],
    radians a position of each pair of neighbouring elements (RoFormer). window: the most positions that are seen.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    _validate(q, k, v, keys, values, position, frequencies, window)
    out = np.empty(q.shape, np.float32)
    oldest = 0 if window is None else max(0, position + 1 - window)
    _attend(q, k, v, keys, values, position, oldest, frequencies, out)
    return out


def _validate(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    frequencies: np.ndarray,
    window: int | None,
) -> None:
    if keys.ndim != 3 or keys.dtype not in (np.float32, np.uint16) or values.shape != keys.shape:
        raise ValueError(f"keys are {keys.dtype} {keys.shape}, values {values.shape}; expected [G, capacity, head_dim]")
    groups, capacity, size = keys.shape
    if q.ndim != 2 or q.shape[1] != size or size % 2 or q.shape[0] % max(groups, 1):
        raise ValueError(f"q is {q.shape}; expected a multiple of {groups} heads of {size} elements, an even number")
    if k.shape != (groups, size) or v.shape != k.shape or frequencies.shape != (size // 2,):
        raise ValueError(f"k is {k.shape}, v {v.shape}, frequencies {frequencies.shape}; keys are {keys.shape}")
    if any(array.dtype != np.float32 for array in (q, k, v, frequencies)) or values.dtype != keys.dtype:
        raise ValueError("q, k, v and frequencies are float32, and values of the keys' type")
    if not all(array.flags.c_contiguous for array in (q, k, v, keys, values, frequencies)):
        raise ValueError("attention takes contiguous arrays")
    if not 0 <= position < capacity:
        raise ValueError(f"position {position} lies outside 0..{capacity - 1}")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; give at least 1")


def _read(kept: np.ndarray, row: np.ndarray) -> None:
    """row = one position's keys or values."""
    raise NotImplementedError("called from compiled code only")


def _write(kept: np.ndarray, row: np.ndarray) -> None:
    """One position's keys or values = row."""
    raise NotImplementedError("called from compiled code only")


@overload(_read, jit_options=_OPTIONS)
def _read_of(kept: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    if cast(Any, kept).dtype == types.float32:

        def read(kept: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = kept[i]
    else:

        def read(kept: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = from_half(kept[i])

    return read


@overload(_write, jit_options=_OPTIONS)
def _write_of(kept: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    if cast(Any, kept).dtype == types.float32:

        def write(kept: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                kept[i] = row[i]
    else:

        def write(kept: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                kept[i] = to_half(row[i])

    return write


@njit(nogil=True, boundscheck=False, fastmath=FASTMATH)
def _weigh(scores: np.ndarray) -> np.float32:
    """Scores -> e to them, less the largest; their sum. A NaN stays one."""
    top = scores[0]
    for s in range(scores.size):
        top = max(top, scores[s])
    total = np.float32(0)
    for s in range(scores.size):
        below = scores[s] - top
        scores[s] = exponential(below) if below == below else below
        total += scores[s]
    return total


@njit(nogil=True, boundscheck=False, fastmath=FASTMATH)
def _turn(row: np.ndarray, position: int, frequencies: np.ndarray, scale: np.float32, turned: np.ndarray) -> None:
    """Neighbouring pairs of a head, as complex numbers, turned to their position, and scaled."""
    for i in range(frequencies.size):
        angle = np.float32(position) * frequencies[i]
        c, s = np.cos(angle) * scale, np.sin(angle) * scale
        turned[2 * i] = row[2 * i] * c - row[2 * i + 1] * s
        turned[2 * i + 1] = row[2 * i] * s + row[2 * i + 1] * c


@partial(kernel, parallel=False)
def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    position: int,
    oldest: int,
    frequencies: np.ndarray,
    out: np.ndarray,
) -> None:
    """A key-value head, and the query heads that share it, after the other."""
    groups, size = k.shape
    each, seen = q.shape[0] // groups, position + 1 - oldest
    scale = np.float32(1 / np.sqrt(size))
    for g in range(groups):
        turned, scores = np.empty((each, size), np.float32), np.empty((each, seen), np.float32)
        row = np.empty(size, np.float32)
        _turn(k[g], position, frequencies, np.float32(1), row)
        _write(keys[g, position], row)
        _write(values[g, position], v[g])
        for r in range(each):
            _turn(q[g * each + r], position, frequencies, scale, turned[r])
        for p in range(seen):
            _read(keys[g, oldest + p], row)
            for r in range(each):
                total = np.float32(0)
                for i in range(size):
                    total += turned[r, i] * row[i]
                scores[r, p] = total
        for r in range(each):
            once = np.float32(1) / _weigh(scores[r])
            for p in range(seen):
                scores[r, p] *= once
            for i in range(size):
                out[g * each + r, i] = 0
        for p in range(seen):
            _read(values[g, oldest + p], row)
            for r in range(each):
                share, h = scores[r, p], g * each + r
                for i in range(size):
                    out[h, i] += share * row[i]
