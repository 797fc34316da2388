"""RMS norm and router (top-k experts) for few tokens, on one thread.

Compiled, because the weights evict the code of torch's five operations from the caches between the large products.
Knows float32 arrays; not experts or layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numba import njit, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import exponential

__all__ = ["Routing", "check_rule", "normalise", "rms_norm", "route", "router"]

_LEAST_SUM = np.float32(2.0**-14)  # that scores are divided by: sigmoids may all be 0


@dataclass(frozen=True)
class Routing:
    """How routing weights follow from the router's logits: see `RouterRule` of `fiddler.models.architecture`."""

    sigmoid: bool = False  # else softmax
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1

    def values(self) -> tuple[int, int, np.float32, int, int]:
        """As compiled code takes them: of the same types whatever the rule."""
        return int(self.sigmoid), int(self.renormalise), np.float32(self.scale), self.groups, self.groups_used


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


def route(
    x: np.ndarray,
    weight: np.ndarray,
    k: int,
    rule: Routing | None = None,
    selection_bias: np.ndarray | None = None,
    router_bias: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Each token's k chosen experts, int64 [T, k], and their routing weights, float32 [T, k].

    x: float32 [T, D]; weight: float32 [E, D]; selection_bias: float32 [E], added to the scores for the choice only;
    router_bias: float32 [E], added to the logits.
    The expert of the largest score comes first; among equals the lower id.
    Raises ValueError when a shape, a data type or the rule does not fit.
    """
    rule = rule or Routing()
    biases = [np.empty(0, np.float32) if each is None else each for each in (selection_bias, router_bias)]
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[1] != x.shape[1] or not 1 <= k <= weight.shape[0]:
        raise ValueError(f"x is {x.shape}, weight {weight.shape}, k {k}; expected [T, D], [E, D] and 1 to E")
    if any(each.dtype != np.float32 for each in (x, weight, *biases)):
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}, a bias another type; expected float32")
    for name, bias in zip(("selection_bias", "router_bias"), biases, strict=True):
        if bias.shape not in ((0,), weight.shape[:1]):
            raise ValueError(f"{name} is {bias.shape}; expected {weight.shape[:1]}")
    check_rule(rule, len(weight), k)
    expert_ids, routing_weights = np.empty((len(x), k), np.int64), np.empty((len(x), k), np.float32)
    _route(*(np.ascontiguousarray(each) for each in (x, weight, *biases)), *rule.values(), expert_ids, routing_weights)
    return expert_ids, routing_weights


def check_rule(rule: Routing, experts: int, k: int) -> None:
    """Raise ValueError unless the groups divide the experts, and those in use have k."""
    if not 1 <= rule.groups_used <= rule.groups <= experts or experts % rule.groups:
        raise ValueError(f"{rule.groups_used} of {rule.groups} groups of {experts} experts")
    if k > experts // rule.groups * rule.groups_used:
        raise ValueError(f"{k} of the experts of {rule.groups_used} of {rule.groups} groups of {experts} experts")


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


@njit(**OPTIONS)
def _exponential(value: np.float32) -> np.float32:
    """A NaN stays a NaN."""
    return exponential(value) if value == value else value


@njit(**OPTIONS)
def _scores(logits: np.ndarray, sigmoid: int) -> None:
    """logits = their softmax or sigmoids."""
    if sigmoid:
        for e in range(logits.size):
            logits[e] = np.float32(1) / (np.float32(1) + _exponential(-logits[e]))
        return
    largest, total = logits[0], np.float32(0)
    for e in range(logits.size):
        largest = max(largest, logits[e])
    for e in range(logits.size):
        logits[e] = _exponential(logits[e] - largest)
        total += logits[e]
    for e in range(logits.size):
        logits[e] /= total


@njit(**OPTIONS)
def _leave_groups(ranks: np.ndarray, available: np.ndarray, groups: int, groups_used: int, two: bool) -> None:
    """Make the experts of all but the best groups unavailable. two: by the sum of a group's two best, not its best."""
    size = ranks.size // groups
    best = np.empty(groups, np.float32)
    for g in range(groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if ranks[e] > first:
                first, second = ranks[e], first
            elif ranks[e] > second:
                second = ranks[e]
        best[g] = first + second if two and size > 1 else first
    for g in range(groups):
        better = 0
        for other in range(groups):
            if best[other] > best[g] or (best[other] == best[g] and other < g):
                better += 1
        if better >= groups_used:
            available[g * size : (g + 1) * size] = False


@partial(kernel, parallel=False)
def _route(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    router_bias: np.ndarray,
    sigmoid: int,
    renormalise: int,
    scale: np.float32,
    groups: int,
    groups_used: int,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
) -> None:
    experts, k = weight.shape[0], expert_ids.shape[1]
    # the softmax's other terms cancel where it is divided by its sum over the chosen: logits will do
    by_logits = sigmoid == 0 and renormalise != 0 and bias.size == 0
    for t in range(x.shape[0]):
        scores, ranks, available = (
            np.empty(experts, np.float32),
            np.empty(experts, np.float32),
            np.ones(experts, np.bool_),
        )
        for e in range(experts):
            scores[e] = _dot(x[t], weight[e])
            if router_bias.size > 0:
                scores[e] += router_bias[e]
            ranks[e] = scores[e]
        if not by_logits:
            _scores(scores, sigmoid)
        if bias.size > 0:
            for e in range(experts):
                ranks[e] = scores[e] + bias[e]
        if groups > 1:
            _leave_groups(ranks, available, groups, groups_used, bias.size > 0)
        total = np.float32(0)
        for j in range(k):
            best = -1
            for e in range(experts):
                if available[e] and (best < 0 or ranks[e] > ranks[best]):
                    best = e
            available[best] = False
            expert_ids[t, j] = best
            chosen = _exponential(scores[best] - scores[expert_ids[t, 0]]) if by_logits else scores[best]
            routing_weights[t, j] = chosen
            total += chosen
        if not by_logits and total < _LEAST_SUM:
            total = _LEAST_SUM
        for j in range(k):
            if renormalise != 0:
                routing_weights[t, j] /= total
            if scale != 1:
                routing_weights[t, j] *= scale


_VECTOR, _MATRIX = types.float32[::1], types.float32[:, ::1]
normalise = FunctionPointer(_rms_norm, _MATRIX, _VECTOR, types.float32, _MATRIX)
router = FunctionPointer(
    _route,
    *(_MATRIX, _MATRIX, _VECTOR, _VECTOR, types.intp, types.intp, types.float32, types.intp, types.intp),
    *(types.int64[:, ::1], _MATRIX),
)
