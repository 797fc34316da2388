"""Decode attention: one new position of each of several sequences attends to that sequence's keys and values.

Checks arrays and starts `attention_kernels.py`; knows no layers, nor the capacity of a KV cache beyond these arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fiddler.kernels.attention_kernels import addresses, attend
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import address_of

__all__ = ["KVPointers", "attend_each"]


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
        attend(
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
