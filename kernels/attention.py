"""Decode attention: one new position of each of several sequences attends to that sequence's keys and values.

These lie in blocks of a pool; a table says which blocks are a sequence's (vLLM, https://arxiv.org/abs/2309.06180).
Checks arrays and starts `attention_kernels.py`; knows no sequences beyond their tables.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fiddler.kernels.attention_kernels import addresses, attend
from fiddler.kernels.kv_rows import row_length
from fiddler.kernels.machine.threads import threads_for

__all__ = ["attend_each", "check_tables", "joined"]


def attend_each(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pool: np.ndarray,
    layer: int,
    tables: Sequence[np.ndarray],
    positions: Sequence[int],
    frequencies: np.ndarray,
    window: int | None = None,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Grouped-query attention of each sequence's new position to itself and all earlier ones: float32 [N, H, head_dim].

    q: float32 [N, H, head_dim]; k, v: float32 [N, G, head_dim]. pool: keys and values of every layer, float32 or the
    uint16 bits of float16, [blocks, L, 2, G, P, head_dim], or, in place of each head_dim numbers, the bytes of their
    blocks of Q8_0, uint8. tables: of each sequence the numbers of its blocks, int64: position p is in row p % P of
    block p // P. Position `positions[n]` is written: k rotated, v unchanged; no two sequences share the block that it
    is in. frequencies: float32 [head_dim / 2], rotation of each pair of neighbouring elements [radians a position]
    (RoFormer). window: length of the sliding window [positions]; blocks before it are not read. sinks: float32 [H], a
    logit of each head that its softmax has beside the scores. One thread computes one key-value head of one sequence.
    Raises ValueError when a shape, a data type, the memory order or a number does not fit.
    """
    _validate(q, k, v, pool, layer, frequencies, window)
    check_tables(pool, tables, positions, window)
    if len(tables) != len(q):
        raise ValueError(f"q is {q.shape}, for {len(tables)} sequences' tables")
    of_heads = np.empty(0, np.float32) if sinks is None else sinks
    if of_heads.dtype != np.float32 or of_heads.shape not in ((0,), (q.shape[1],)):
        raise ValueError(f"sinks are {of_heads.dtype} {of_heads.shape}; expected float32 {(q.shape[1],)}")
    out = np.empty(q.shape, np.float32)
    if not len(q):
        return out
    position_array = np.array(positions, np.int64)
    oldest = np.zeros_like(position_array) if window is None else np.maximum(0, position_array + 1 - window)
    multiplications = 2 * int((position_array + 1 - oldest).sum()) * q.shape[1] * q.shape[2]
    with threads_for(multiplications):
        attend(
            *(q, k, v, pool, layer, *joined(tables), position_array, oldest, frequencies, of_heads, out),
            addresses(pool.dtype),
        )
    return out


def joined(tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tables one after the other, and the begin of each: int64, as `attention_kernels.attend` takes them."""
    if len(tables) == 1:
        return tables[0], np.zeros(1, np.int64)
    ends = np.cumsum([table.size for table in tables])
    return np.concatenate(tables), np.concatenate([[0], ends[:-1]])


def check_tables(
    pool: np.ndarray, tables: Sequence[np.ndarray], positions: Sequence[int], window: int | None = None
) -> None:
    """Raise ValueError where a table lacks a block that is read or written, or two sequences write to one block."""
    if len(tables) != len(positions):
        raise ValueError(f"{len(tables)} tables, {len(positions)} positions")
    per_block, written = pool.shape[4], set()
    for table, position in zip(tables, positions, strict=True):
        if table.ndim != 1 or table.dtype != np.int64 or not table.flags.c_contiguous:
            raise ValueError(f"a table is {table.dtype} {table.shape}; expected contiguous int64 [blocks]")
        if not 0 <= position < per_block * table.size:
            raise ValueError(f"position {position} lies outside 0..{per_block * table.size - 1}")
        last = position // per_block
        oldest = 0 if window is None else max(0, position + 1 - window) // per_block
        used = table[oldest : last + 1]
        if used.min() < 0 or used.max() >= len(pool):
            raise ValueError(f"a block's number lies outside 0..{len(pool) - 1}")
        written.add(int(table[last]))
    if len(written) < len(tables):
        raise ValueError("two sequences write to the same block")


def _validate(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    pool: np.ndarray,
    layer: int,
    frequencies: np.ndarray,
    window: int | None,
) -> None:
    if q.ndim != 3 or len(q) != len(k) or len(q) != len(v):
        raise ValueError(f"q is {q.shape}, k {k.shape}, v {v.shape}; expected [N, H, head_dim] and [N, G, head_dim]")
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
    length = row_length(pool.dtype, head_dim)
    if pool.ndim != 6 or pool.shape[2:4] != (2, groups) or pool.shape[5] != length or not pool.shape[4]:
        raise ValueError(f"the pool is {pool.shape}; expected [blocks, L, 2, {groups}, P, {length}]")
    if not (pool.flags.c_contiguous and pool.flags.writeable):
        raise ValueError("the pool must be contiguous and writeable")
    if not 0 <= layer < pool.shape[1]:
        raise ValueError(f"layer {layer} lies outside 0..{pool.shape[1] - 1}")
