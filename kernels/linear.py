"""Matrix products from weights in place: the dense layers on the CPU. Knows arrays; not layers or files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.expert_matrices import ExpertMatrices, check_experts, check_stored
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul.blocks import stored_kinds
from fiddler.kernels.matmul.epilogues import PLAIN
from fiddler.kernels.matmul.grouped import run

__all__ = ["linear", "linears", "per_expert", "per_head"]


def linear(x: np.ndarray, w: np.ndarray, variant: KernelVariant) -> np.ndarray:
    """x . w transposed: float32 [T, N].

    x: float32 [T, K]; w: stored weights [N, K], as `WeightFormat.stored_shape`, possibly a read-only mapping; `variant`
    says how they are read and to which type x is rounded first.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    return linears(x, [w], variant)[0]


def linears(
    x: np.ndarray, weights: Sequence[np.ndarray], variant: KernelVariant | Sequence[KernelVariant]
) -> list[np.ndarray]:
    """`linear` of one x with several weights: x is packed once.

    variant: of all, or one for each; then they have one `grouping`.
    """
    variants = (variant,) * len(weights) if isinstance(variant, KernelVariant) else tuple(variant)
    if len({each.grouping for each in variants}) > 1:
        raise ValueError("the weights have formats that one call cannot multiply")
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, K]")
    tokens, width = x.shape
    for w, each in zip(weights, variants, strict=True):
        check_stored("w", w, (len(w), width), each)
    if tokens == 0:
        return [np.empty((0, w.shape[0]), np.float32) for w in weights]
    outputs = [w.shape[0] for w in weights]
    y = np.empty(tokens * sum(outputs), np.float32)
    matrices = np.array([[address_of(w)] for w in weights])
    expert_ids, routing_weights, columns = _one_expert(tokens, width)
    stored, rows = stored_kinds(variants, (width,) * len(variants)), np.array(outputs)
    grouping = variants[0].grouping
    run(grouping, x, expert_ids, routing_weights, columns, matrices, stored, rows, PLAIN, y, y.size * width)
    ends = [tokens * end for end in accumulate(outputs)]
    return [y[end - tokens * each : end].reshape(tokens, each) for each, end in zip(outputs, ends, strict=True)]


def per_head(x: np.ndarray, w: np.ndarray, variant: KernelVariant) -> np.ndarray:
    """Each head's x . its own w transposed: float32 [T, H, N].

    x: float32 [T, H, K]; w: stored weights [H, N, K], possibly a read-only mapping; `variant` as in `linear`.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    if x.ndim != 3 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, H, K]")
    tokens, heads, width = x.shape
    check_stored("w", w, (heads, *w.shape[1:2], width), variant)
    rows = np.tile(np.arange(heads), tokens)  # a head is the expert of its rows
    return per_expert(x.reshape(-1, width), rows, w, variant).reshape(tokens, heads, w.shape[1])


def per_expert(
    x: np.ndarray, expert_ids: np.ndarray, w: ExpertMatrices | np.ndarray, variant: KernelVariant
) -> np.ndarray:
    """Each row's x . its own expert's w transposed: float32 [T, N].

    x: float32 [T, K]; expert_ids: int64 [T]; w: stored weights [E, N, K], as one array, possibly a read-only mapping,
    or as `ExpertMatrices`; `variant` as in `linear`.
    Raises ValueError when a shape, a data type, the memory order or an expert id does not fit.
    """
    w = w if isinstance(w, ExpertMatrices) else ExpertMatrices.of(w)
    if x.ndim != 2 or x.dtype != np.float32 or expert_ids.shape != x.shape[:1]:
        raise ValueError(f"x is {x.dtype} {x.shape}, expert_ids {expert_ids.shape}, w {w.shape}")
    (experts, outputs, _), width = w.shape, x.shape[1]
    check_experts("w", w, (experts, outputs, width), variant)
    y = np.empty(len(x) * outputs, np.float32)
    if len(x):
        rows, columns = np.ascontiguousarray(expert_ids, np.int64)[:, None], np.full(experts, width)
        matrices, stored = w.addresses[None], stored_kinds((variant,), (width,))
        ones, grouping, work = _ones(len(x)), variant.grouping, y.size * width
        if not run(grouping, x, rows, ones, columns, matrices, stored, np.array([outputs]), PLAIN, y, work):
            raise ValueError(f"an expert id lies outside 0..{experts - 1}")
    return y.reshape(len(x), outputs)


@lru_cache(maxsize=64)
def _ones(rows: int) -> np.ndarray:
    return np.ones((rows, 1), np.float32)


@lru_cache(maxsize=64)
def _one_expert(tokens: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert ids, routing weights and hidden rows of a dense product: every token has weight 1 in expert 0."""
    return np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32), np.array([width])
