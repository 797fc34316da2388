"""Prepares a token's queries or keys between their product and attention: bias, clamp, norm, order of elements, scale.

On one thread, in compiled code, as `norm_router.py`. Knows float32 arrays; not layers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel

__all__ = ["heads", "prepare_heads"]


@njit(**OPTIONS, fastmath=FASTMATH)
def _normalise(row: np.ndarray, weight: np.ndarray, epsilon: np.float32) -> None:
    """RMS norm in place."""
    total = np.float32(0)
    for i in range(row.size):
        total += row[i] * row[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(row.size) + epsilon)
    for i in range(row.size):
        row[i] = row[i] * scale * weight[i]


@partial(kernel, parallel=False)
def prepare_heads(
    x: np.ndarray,
    bias: np.ndarray,
    weight: np.ndarray,
    epsilon: np.float32,
    clamp: np.float32,
    head_dim: int,
    halves: int,
    scale: np.float32,
) -> None:
    """In place, x float32 [T, heads * head_dim], in this order.

    bias: [heads * head_dim], added; empty for none. weight: of an RMS norm, [head_dim] for each head by itself or
    [heads * head_dim] for all together; empty for none. clamp: elements are clamped to its negative and to it; 0 for
    none. halves: of each head's first `halves` elements, i and i + halves / 2 become neighbours; 0 for none.
    scale: a factor of all.
    """
    tokens, width = x.shape
    row = np.empty(head_dim, np.float32)
    for t in range(tokens):
        for i in range(bias.size):
            x[t, i] += bias[i]
        if weight.size > 0:
            for begin in range(0, width, weight.size):
                _normalise(x[t, begin : begin + weight.size], weight, epsilon)
        if clamp > 0:
            for i in range(width):
                x[t, i] = min(max(x[t, i], -clamp), clamp)
        if halves > 0:
            for begin in range(0, width, head_dim):
                for i in range(halves):
                    row[i] = x[t, begin + i]
                for i in range(halves // 2):
                    x[t, begin + 2 * i] = row[i]
                    x[t, begin + 2 * i + 1] = row[i + halves // 2]
        if scale != 1:
            for i in range(width):
                x[t, i] *= scale


_VECTOR, _MATRIX = types.float32[::1], types.float32[:, ::1]
heads = FunctionPointer(
    prepare_heads,
    *(_MATRIX, _VECTOR, _VECTOR, types.float32, types.float32, types.intp, types.intp, types.float32),
)
