"""RMS norm and router (top-k experts) for few tokens, on one thread.

Compiled, because the weights evict the code of torch's five operations from the caches between the large products.
Knows float32 arrays; not experts or layers.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numba import njit, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import exponential

__all__ = ["normalise", "rms_norm", "route", "router"]


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    """x / sqrt(mean of x * x + epsilon) * weight, row by row (Zhang and Sennrich 2019): float32 [T, D].

    x: float32 [T, D]; weight: float32 [D]. Raises ValueError when a shape or a data type does not fit.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or x.dtype != np.float32 or weight.dtype != np.float32:
        raise ValueError(
            f"x is {x.dtype} {x.shape}, weight {weight.dtype} {weight.shape}; expected float32 [T, D], [D]"
        )
    x, out = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
    _rms_norm(x, np.ascontiguousarray(weight), np.float32(epsilon), out)
    return out


def route(x: np.ndarray, weight: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Each token's k most probable experts, int64 [T, k], and their routing weights, float32 [T, k], which sum to 1.

    x: float32 [T, D]; weight: float32 [E, D]. The probabilities are the softmax of weight . x; the most probable
    expert comes first; among equals the lower id.
    Raises ValueError when a shape or a data type does not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1] or not 1 <= k <= weight.shape[0]:
        raise ValueError(f"x is {x.shape}, weight {weight.shape}, k {k}; expected [T, D], [E, D] and 1 to E")
    if x.dtype != np.float32 or weight.dtype != np.float32:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; expected float32")
    expert_ids, routing_weights = np.empty((len(x), k), np.int64), np.empty((len(x), k), np.float32)
    _route(np.ascontiguousarray(x), np.ascontiguousarray(weight), expert_ids, routing_weights)
    return expert_ids, routing_weights


@njit(**OPTIONS, fastmath=FASTMATH)
def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    total = np.float32(0)
    for i in range(a.size):
        total += a[i] * b[i]
    return total


@partial(kernel, parallel=False)
def _rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: np.float32, out: np.ndarray) -> None:
    width = x.shape[1]
    for t in range(x.shape[0]):
        scale = np.float32(1) / np.sqrt(_dot(x[t], x[t]) / np.float32(width) + epsilon)
        for i in range(width):
            out[t, i] = x[t, i] * scale * weight[i]


@partial(kernel, parallel=False)
def _route(x: np.ndarray, weight: np.ndarray, expert_ids: np.ndarray, routing_weights: np.ndarray) -> None:
    experts, k = weight.shape[0], expert_ids.shape[1]
    for t in range(x.shape[0]):
        scores, available = np.empty(experts, np.float32), np.empty(experts, np.bool_)
        for e in range(experts):
            scores[e], available[e] = _dot(x[t], weight[e]), True
        total = np.float32(0)
        for j in range(k):
            best = -1
            for e in range(experts):
                if available[e] and (best < 0 or scores[e] > scores[best]):
                    best = e
            available[best] = False
            expert_ids[t, j] = best
            # softmax over all experts, divided by its sum over the selected ones: the other experts' terms cancel
            shifted = scores[best] - scores[expert_ids[t, 0]]
            routing_weights[t, j] = exponential(shifted) if shifted == shifted else shifted
            total += routing_weights[t, j]
        for j in range(k):
            routing_weights[t, j] /= total


_VECTOR, _MATRIX = types.float32[::1], types.float32[:, ::1]
normalise = FunctionPointer(_rms_norm, _MATRIX, _VECTOR, types.float32, _MATRIX)
router = FunctionPointer(_route, _MATRIX, _MATRIX, types.int64[:, ::1], _MATRIX)
