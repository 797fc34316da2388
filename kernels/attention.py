"""Attention of one new position of each of several sequences over its keys and values, which it joins.

Rotate, store, attend: a task for each key-value head of each sequence, shared out among the threads. Knows arrays. Does
not know sequences, layers or how many positions there is room for beyond the arrays it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic, overload
from numba.np.numpy_support import from_dtype

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import exponential, from_half, to_half
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import address_of

__all__ = ["KVPointers", "addresses", "attend_each", "attention"]


def attend_each(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    positions: Sequence[int],
    frequencies: np.ndarray,
    window: int | None = None,
) -> np.ndarray:
    """Grouped-query attention of each sequence's new position to itself and those before it: float32 [N, H, head_dim].

    q: float32 [N, H, head_dim]; k, v: float32 [N, G, head_dim]. keys, values: of each sequence, float32 or the uint16
    bits of float16, [G, capacity, head_dim], whose place `positions[n]` is written: k rotated, v as it is; no two of
    them share memory. frequencies: float32 [head_dim / 2], radians a position of each pair of neighbouring elements
    (RoFormer). window: the most positions that are seen. A key-value head of a sequence is done on one thread.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    _validate(q, k, v, keys, values, positions, frequencies, window)
    out = np.empty(q.shape, np.float32)
    if not len(q):
        return out
    at = np.array(positions, np.int64)
    oldest = np.zeros_like(at) if window is None else np.maximum(0, at + 1 - window)
    places = np.array([[address_of(kept) for kept in half] for half in (keys, values)])
    capacities = np.array([kept.shape[1] for kept in keys])
    multiplications = 2 * int((at + 1 - oldest).sum()) * q.shape[1] * q.shape[2]
    with threads_for(multiplications):
        _attend(
            q,
            k,
            v,
            places,
            capacities,
            np.empty(0, keys[0].dtype),
            at,
            oldest,
            frequencies,
            out,
            addresses(keys[0].dtype),
        )
    return out


class KVPointers:
    """Keys and values of one sequence in every layer, validated once: what `decode` attends to and adds to.

    keys, values: of each layer, float32 or the uint16 bits of float16, [G, capacity, head_dim], as in `attend_each`.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """

    def __init__(self, keys: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> None:
        if not len(keys) == len(values) > 0:
            raise ValueError(f"{len(keys)} layers' keys, {len(values)} values")
        if keys[0].ndim != 3 or keys[0].dtype not in (np.float32, np.uint16):
            raise ValueError(f"keys are {keys[0].dtype} {keys[0].shape}; expected float32, or the bits of float16")
        self.shape, self.dtype = keys[0].shape, keys[0].dtype
        for array in (*keys, *values):
            if array.shape != self.shape or array.dtype != self.dtype:
                raise ValueError(f"keys or values are {array.dtype} {array.shape}; expected {self.dtype} {self.shape}")
            if not array.flags.c_contiguous or not array.flags.writeable:
                raise ValueError("keys and values are contiguous, and may be written")
        self.empty = np.empty(0, self.dtype)  # tells compiled code the type
        self._arrays = *keys, *values  # which must live as long as their addresses are used
        self.places = np.array(
            [[[address_of(k)], [address_of(v)]] for k, v in zip(keys, values, strict=True)]
        )  # [L, 2, 1]


def _validate(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    positions: Sequence[int],
    frequencies: np.ndarray,
    window: int | None,
) -> None:
    if q.ndim != 3 or not len(q) == len(k) == len(v) == len(keys) == len(values) == len(positions):
        raise ValueError(
            f"q is {q.shape}, for {len(keys)} sequences' keys, {len(values)} values, {len(positions)} places"
        )
    _, heads, size = q.shape
    groups = k.shape[1] if k.ndim == 3 else 0
    if k.shape != (len(q), groups, size) or v.shape != k.shape or not groups or heads % groups or size % 2:
        raise ValueError(f"q is {q.shape}, k {k.shape}, v {v.shape}; expected [N, H, head_dim] and [N, G, head_dim]")
    if frequencies.shape != (size // 2,):
        raise ValueError(f"frequencies are {frequencies.shape}; expected {(size // 2,)}")
    if any(array.dtype != np.float32 or not array.flags.c_contiguous for array in (q, k, v, frequencies)):
        raise ValueError("q, k, v and frequencies are float32, and contiguous")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; give at least 1")
    kind = keys[0].dtype if len(keys) else np.float32
    if kind not in (np.float32, np.uint16):
        raise ValueError(f"keys are {kind}; expected float32, or the bits of float16")
    for one, other, position in zip(keys, values, positions, strict=True):
        if one.ndim != 3 or (one.shape[0], one.shape[2]) != (groups, size) or other.shape != one.shape:
            raise ValueError(f"keys are {one.shape}, values {other.shape}; expected [{groups}, capacity, {size}]")
        if one.dtype != kind or other.dtype != kind or not (one.flags.c_contiguous and other.flags.c_contiguous):
            raise ValueError("keys and values are contiguous, and all of one type")
        if not 0 <= position < one.shape[1]:
            raise ValueError(f"position {position} lies outside 0..{one.shape[1] - 1}")


def _read(kept: np.ndarray, row: np.ndarray) -> None:
    """row = one position's keys or values."""
    raise NotImplementedError("called from compiled code only")


def _write(kept: np.ndarray, row: np.ndarray) -> None:
    """One position's keys or values = row."""
    raise NotImplementedError("called from compiled code only")


@overload(_read, jit_options=OPTIONS)
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


@overload(_write, jit_options=OPTIONS)
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


@njit(**OPTIONS, fastmath=FASTMATH)
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


@njit(**OPTIONS, fastmath=FASTMATH)
def _turn(row: np.ndarray, position: int, frequencies: np.ndarray, scale: np.float32, turned: np.ndarray) -> None:
    """Neighbouring pairs of a head, as complex numbers, turned to their position, and scaled."""
    for i in range(frequencies.size):
        angle = np.float32(position) * frequencies[i]
        c, s = np.cos(angle) * scale, np.sin(angle) * scale
        turned[2 * i] = row[2 * i] * c - row[2 * i + 1] * s
        turned[2 * i + 1] = row[2 * i] * s + row[2 * i + 1] * c


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    """An address, as Numba takes a pointer."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@partial(kernel, parallel=False)
def _attend_group(
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
    """One key-value head, k and v [head_dim], and the query heads that share it, q [H / G, head_dim]."""
    (each, size), seen = q.shape, position + 1 - oldest
    scale = np.float32(1 / np.sqrt(size))
    turned, scores = np.empty((each, size), np.float32), np.empty((each, seen), np.float32)
    row = np.empty(size, np.float32)
    _turn(k, position, frequencies, np.float32(1), row)
    _write(keys[position], row)
    _write(values[position], v)
    for r in range(each):
        _turn(q[r], position, frequencies, scale, turned[r])
    for p in range(seen):
        _read(keys[oldest + p], row)
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
            out[r, i] = 0
    for p in range(seen):
        _read(values[oldest + p], row)
        for r in range(each):
            share = scores[r, p]
            for i in range(size):
                out[r, i] += share * row[i]


_VECTOR, _MATRIX = types.float32[::1], types.float32[:, ::1]
_group = FunctionPointer(_attend_group, _MATRIX, _VECTOR, _VECTOR, None, None, types.intp, types.intp, _VECTOR, _MATRIX)
_call_group = _group.call


@lru_cache(maxsize=2)
def addresses(kind: np.dtype) -> int:
    """The address of what `attention` calls, for keys and values of this type."""
    kept = from_dtype(kind)[:, ::1]
    return _group.address(kept, kept)


@kernel
def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    places: np.ndarray,
    capacities: np.ndarray,
    kind: np.ndarray,
    positions: np.ndarray,
    oldest: np.ndarray,
    frequencies: np.ndarray,
    out: np.ndarray,
    attend: int,
) -> None:
    """places: int64 [2, N], the addresses of keys and values, of the type of `kind`, which is empty.

    attend: the address of `_attend_group` for that type.
    """
    sequences, groups, size = k.shape
    each = q.shape[1] // groups
    for task in prange(sequences * groups):
        n, g = task // groups, task % groups
        shape = (groups, capacities[n], size)
        keys = carray(_pointer(places[0, n]), shape, kind.dtype)[g]
        values = carray(_pointer(places[1, n]), shape, kind.dtype)[g]
        heads = slice(g * each, (g + 1) * each)
        _call_group(
            attend,
            (q[n, heads], k[n, g], v[n, g], keys, values, positions[n], oldest[n], frequencies, out[n, heads]),
        )


_HEADS, _PLACES = types.float32[:, :, ::1], types.intp[::1]
attention = FunctionPointer(
    _attend,
    *(_HEADS, _HEADS, _HEADS, types.intp[:, ::1], _PLACES, None, _PLACES, _PLACES, _VECTOR, _HEADS, types.intp),
)
