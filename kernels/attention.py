"""Decode attention: one new position of each of several sequences attends to that sequence's keys and values.

Rotates q and k, stores k and v, attends: one parallel task for each key-value head of each sequence. Knows arrays; not
layers, nor the capacity of a KV cache beyond the arrays that it gets.
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
    """Grouped-query attention of each sequence's new position to itself and all earlier ones: float32 [N, H, head_dim].

    q: float32 [N, H, head_dim]; k, v: float32 [N, G, head_dim]. keys, values: one array for each sequence, float32 or
    the uint16 bits of float16, [G, capacity, head_dim]; position `positions[n]` is written: k rotated, v unchanged. No
    two arrays share memory. frequencies: float32 [head_dim / 2], rotation of each pair of neighbouring elements
    [radians a position] (RoFormer). window: length of the sliding window [positions]. One thread computes one key-value
    head of one sequence.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    _validate(q, k, v, keys, values, positions, frequencies, window)
    out = np.empty(q.shape, np.float32)
    if not len(q):
        return out
    position_array = np.array(positions, np.int64)
    oldest = np.zeros_like(position_array) if window is None else np.maximum(0, position_array + 1 - window)
    kv_addresses = np.array([[address_of(array) for array in arrays] for arrays in (keys, values)])
    capacities = np.array([array.shape[1] for array in keys])
    multiplications = 2 * int((position_array + 1 - oldest).sum()) * q.shape[1] * q.shape[2]
    with threads_for(multiplications):
        _attend(
            q,
            k,
            v,
            kv_addresses,
            capacities,
            np.empty(0, keys[0].dtype),
            position_array,
            oldest,
            frequencies,
            out,
            addresses(keys[0].dtype),
        )
    return out


class KVPointers:
    """Addresses of one sequence's keys and values in every layer, validated once; `decode` reads and extends them.

    keys, values: one array for each layer, float32 or the uint16 bits of float16, [G, capacity, head_dim], as in
    `attend_each`.
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
                raise ValueError("keys and values must be contiguous and writeable")
        self.empty = np.empty(0, self.dtype)  # carries the type into compiled code
        self._arrays = *keys, *values  # keeps the memory alive while its addresses are in use
        self.addresses = np.array(
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
            f"q is {q.shape}, for {len(keys)} sequences' keys, {len(values)} values, {len(positions)} positions"
        )
    _, heads, head_dim = q.shape
    groups = k.shape[1] if k.ndim == 3 else 0
    if k.shape != (len(q), groups, head_dim) or v.shape != k.shape or not groups or heads % groups or head_dim % 2:
        raise ValueError(f"q is {q.shape}, k {k.shape}, v {v.shape}; expected [N, H, head_dim] and [N, G, head_dim]")
    if frequencies.shape != (head_dim // 2,):
        raise ValueError(f"frequencies are {frequencies.shape}; expected {(head_dim // 2,)}")
    if any(array.dtype != np.float32 or not array.flags.c_contiguous for array in (q, k, v, frequencies)):
        raise ValueError("q, k, v and frequencies must be float32 and contiguous")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} positions; give at least 1")
    kv_dtype = keys[0].dtype if len(keys) else np.float32
    if kv_dtype not in (np.float32, np.uint16):
        raise ValueError(f"keys are {kv_dtype}; expected float32, or the bits of float16")
    for key, value, position in zip(keys, values, positions, strict=True):
        if key.ndim != 3 or (key.shape[0], key.shape[2]) != (groups, head_dim) or value.shape != key.shape:
            raise ValueError(f"keys are {key.shape}, values {value.shape}; expected [{groups}, capacity, {head_dim}]")
        if (
            key.dtype != kv_dtype
            or value.dtype != kv_dtype
            or not (key.flags.c_contiguous and value.flags.c_contiguous)
        ):
            raise ValueError("keys and values must be contiguous and all of one type")
        if not 0 <= position < key.shape[1]:
            raise ValueError(f"position {position} lies outside 0..{key.shape[1] - 1}")


def _read(stored: np.ndarray, row: np.ndarray) -> None:
    """row = stored: one position's keys or values, as float32."""
    raise NotImplementedError("called from compiled code only")


def _write(stored: np.ndarray, row: np.ndarray) -> None:
    """stored = row: one position's keys or values, in the KV cache's type."""
    raise NotImplementedError("called from compiled code only")


@overload(_read, jit_options=OPTIONS)
def _read_of(stored: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    if cast(Any, stored).dtype == types.float32:

        def read(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = stored[i]
    else:

        def read(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                row[i] = from_half(stored[i])

    return read


@overload(_write, jit_options=OPTIONS)
def _write_of(stored: np.ndarray, row: np.ndarray) -> Callable[..., None]:
    if cast(Any, stored).dtype == types.float32:

        def write(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                stored[i] = row[i]
    else:

        def write(stored: np.ndarray, row: np.ndarray) -> None:
            for i in range(row.size):
                stored[i] = to_half(row[i])

    return write


@njit(**OPTIONS, fastmath=FASTMATH)
def _softmax_terms(scores: np.ndarray) -> np.float32:
    """Replace the scores by exp(score - largest) and return their sum. A NaN stays a NaN."""
    largest = scores[0]
    for s in range(scores.size):
        largest = max(largest, scores[s])
    total = np.float32(0)
    for s in range(scores.size):
        shifted = scores[s] - largest
        scores[s] = exponential(shifted) if shifted == shifted else shifted
        total += scores[s]
    return total


@njit(**OPTIONS, fastmath=FASTMATH)
def _rotate(row: np.ndarray, position: int, frequencies: np.ndarray, scale: np.float32, rotated: np.ndarray) -> None:
    """rotated = the head's neighbouring pairs as complex numbers, rotated to their position, times `scale`."""
    for i in range(frequencies.size):
        angle = np.float32(position) * frequencies[i]
        c, s = np.cos(angle) * scale, np.sin(angle) * scale
        rotated[2 * i] = row[2 * i] * c - row[2 * i + 1] * s
        rotated[2 * i + 1] = row[2 * i] * s + row[2 * i + 1] * c


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    """An int64 address as a Numba pointer."""

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
    """Attention of one key-value head, k and v [head_dim], for the query heads that share it, q [H / G, head_dim]."""
    (heads, head_dim), length = q.shape, position + 1 - oldest
    scale = np.float32(1 / np.sqrt(head_dim))
    rotated, scores = np.empty((heads, head_dim), np.float32), np.empty((heads, length), np.float32)
    row = np.empty(head_dim, np.float32)
    _rotate(k, position, frequencies, np.float32(1), row)
    _write(keys[position], row)
    _write(values[position], v)
    for r in range(heads):
        _rotate(q[r], position, frequencies, scale, rotated[r])
    for p in range(length):
        _read(keys[oldest + p], row)
        for r in range(heads):
            total = np.float32(0)
            for i in range(head_dim):
                total += rotated[r, i] * row[i]
            scores[r, p] = total
    for r in range(heads):
        inverse = np.float32(1) / _softmax_terms(scores[r])
        for p in range(length):
            scores[r, p] *= inverse
        for i in range(head_dim):
            out[r, i] = 0
    for p in range(length):
        _read(values[oldest + p], row)
        for r in range(heads):
            weight = scores[r, p]
            for i in range(head_dim):
                out[r, i] += weight * row[i]


_VECTOR, _MATRIX = types.float32[::1], types.float32[:, ::1]
_group = FunctionPointer(_attend_group, _MATRIX, _VECTOR, _VECTOR, None, None, types.intp, types.intp, _VECTOR, _MATRIX)
_call_group = _group.call


@lru_cache(maxsize=2)
def addresses(kv_dtype: np.dtype) -> int:
    """The address of `_attend_group` for keys and values of this type, which `attention` calls."""
    array_type = from_dtype(kv_dtype)[:, ::1]
    return _group.address(array_type, array_type)


@kernel
def _attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kv_addresses: np.ndarray,
    capacities: np.ndarray,
    kv_type: np.ndarray,
    positions: np.ndarray,
    oldest: np.ndarray,
    frequencies: np.ndarray,
    out: np.ndarray,
    attend: int,
) -> None:
    """kv_addresses: int64 [2, N], of keys and of values; kv_type: an empty array of their type.

    attend: the address of `_attend_group` for that type.
    """
    sequences, groups, head_dim = k.shape
    group_heads = q.shape[1] // groups
    for task in prange(sequences * groups):
        n, g = task // groups, task % groups
        shape = (groups, capacities[n], head_dim)
        keys = carray(_pointer(kv_addresses[0, n]), shape, kv_type.dtype)[g]
        values = carray(_pointer(kv_addresses[1, n]), shape, kv_type.dtype)[g]
        heads = slice(g * group_heads, (g + 1) * group_heads)
        _call_group(
            attend,
            (q[n, heads], k[n, g], v[n, g], keys, values, positions[n], oldest[n], frequencies, out[n, heads]),
        )


_HEADS, _INTS = types.float32[:, :, ::1], types.intp[::1]
attention = FunctionPointer(
    _attend,
    *(_HEADS, _HEADS, _HEADS, types.intp[:, ::1], _INTS, None, _INTS, _INTS, _VECTOR, _HEADS, types.intp),
)
