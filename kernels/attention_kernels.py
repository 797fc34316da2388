"""The compiled attention of one new position of each sequence to its keys and values; `attention.py` is the way in.

Rotates q and k, stores k and v, attends: one parallel task for each key-value head of each sequence. Knows addresses.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from numba import njit, prange, types
from numba.np.numpy_support import from_dtype

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import exponential
from fiddler.kernels.kv_rows import read_row, write_row

__all__ = ["addresses", "attend", "attention", "pool_type"]


@njit(**OPTIONS, fastmath=FASTMATH)
def _softmax_terms(scores: np.ndarray, sinks: np.ndarray, head: int) -> np.float32:
    """Replace the scores by exp(score - largest) and return their sum, with the head's sink. A NaN stays a NaN."""
    largest = scores[0]
    for s in range(scores.size):
        largest = max(largest, scores[s])
    total = np.float32(0)
    if sinks.size > 0:
        largest = max(largest, sinks[head])
        total = exponential(sinks[head] - largest)
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


@partial(kernel, parallel=False)
def _attend_group(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pool: np.ndarray,
    table: np.ndarray,
    layer: int,
    group: int,
    position: int,
    oldest: int,
    frequencies: np.ndarray,
    sinks: np.ndarray,
    out: np.ndarray,
) -> None:
    """Attention of one key-value head, k and v [head_dim], for the query heads that share it, q [H / G, head_dim].

    sinks: [H / G], or empty for none. Positions `oldest` to `position` are in blocks `table` [...] of `pool`; the last
    of them is written.
    """
    (heads, head_dim), length, per_block = q.shape, position + 1 - oldest, pool.shape[4]
    scale = np.float32(1 / np.sqrt(head_dim))
    rotated, scores = np.empty((heads, head_dim), np.float32), np.empty((heads, length), np.float32)
    row = np.empty(head_dim, np.float32)
    _rotate(k, position, frequencies, np.float32(1), row)
    last, at = table[position // per_block], position % per_block
    write_row(pool[last, layer, 0, group, at], row)
    write_row(pool[last, layer, 1, group, at], v)
    for r in range(heads):
        _rotate(q[r], position, frequencies, scale, rotated[r])
    for i in range(oldest // per_block, position // per_block + 1):
        keys, first = pool[table[i], layer, 0, group], i * per_block
        for p in range(max(oldest, first), min(position + 1, first + per_block)):
            read_row(keys[p - first], row)
            for r in range(heads):
                total = np.float32(0)
                for d in range(head_dim):
                    total += rotated[r, d] * row[d]
                scores[r, p - oldest] = total
    for r in range(heads):
        inverse = np.float32(1) / _softmax_terms(scores[r], sinks, r)
        for p in range(length):
            scores[r, p] *= inverse
        for d in range(head_dim):
            out[r, d] = 0
    for i in range(oldest // per_block, position // per_block + 1):
        values, first = pool[table[i], layer, 1, group], i * per_block
        for p in range(max(oldest, first), min(position + 1, first + per_block)):
            read_row(values[p - first], row)
            for r in range(heads):
                weight = scores[r, p - oldest]
                for d in range(head_dim):
                    out[r, d] += weight * row[d]


_VECTOR, _MATRIX, _INTS, _INT = types.float32[::1], types.float32[:, ::1], types.intp[::1], types.intp
_group = FunctionPointer(
    _attend_group, _MATRIX, _VECTOR, _VECTOR, None, _INTS, _INT, _INT, _INT, _INT, _VECTOR, _VECTOR, _MATRIX
)
_call_group = _group.call


@lru_cache(maxsize=4)
def addresses(kv_dtype: np.dtype) -> int:
    """The address of `_attend_group` for keys and values of this type, which `attention` calls."""
    return _group.address(pool_type(kv_dtype))


def pool_type(kv_dtype: np.dtype) -> types.Array:
    """Numba's type of a pool of keys and values: see `attend`."""
    return from_dtype(kv_dtype)[:, :, :, :, :, ::1]


@kernel
def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pool: np.ndarray,
    layer: int,
    tables: np.ndarray,
    first: np.ndarray,
    positions: np.ndarray,
    oldest: np.ndarray,
    frequencies: np.ndarray,
    sinks: np.ndarray,
    out: np.ndarray,
    attend_group: int,
) -> None:
    """pool: [blocks, L, 2, G, positions a block, head_dim]: blocks of keys and values of every layer.

    tables: the sequences' block numbers, one after the other; those of sequence n begin at first[n], of [N].
    sinks: float32 [H], or empty for none. attend_group: the address of `_attend_group` for the pool's type.
    """
    sequences, groups, _ = k.shape
    group_heads = q.shape[1] // groups
    for task in prange(sequences * groups):
        n, g = task // groups, task % groups
        heads = slice(g * group_heads, (g + 1) * group_heads)
        table, of_group = tables[first[n] :], sinks[g * group_heads : (g + 1) * group_heads]
        _call_group(
            attend_group,
            (
                *(q[n, heads], k[n, g], v[n, g], pool, table, layer, g, positions[n], oldest[n], frequencies),
                *(of_group, out[n, heads]),
            ),
        )


_HEADS = types.float32[:, :, ::1]
attention = FunctionPointer(
    attend, _HEADS, _HEADS, _HEADS, None, _INT, _INTS, _INTS, _INTS, _INTS, _VECTOR, _VECTOR, _HEADS, _INT
)
