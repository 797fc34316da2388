"""Matrix products from 16-bit weights in place: the dense layers on the CPU. Knows arrays; not layers or files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.expert_matrices import ExpertMatrices
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul.grouped import run

__all__ = ["linear", "linears", "per_head"]


def linear(x: np.ndarray, w: np.ndarray, variant: KernelVariant) -> np.ndarray:
    """x . w transposed: float32 [T, N].

    x: float32 [T, K]; w: uint16 bits [N, K], possibly a read-only mapping; `variant` says how they are read and
    whether x is rounded to bf16 first.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    return linears(x, [w], variant)[0]


def linears(x: np.ndarray, weights: Sequence[np.ndarray], variant: KernelVariant) -> list[np.ndarray]:
    """`linear` of one x with several weights: x is packed once."""
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, K]")
    tokens, width = x.shape
    for w in weights:
        if w.ndim != 2 or w.dtype != np.uint16 or w.shape[1] != width or not w.flags.c_contiguous:
            raise ValueError(f"w is {w.dtype} {w.shape}; expected contiguous uint16 bits [N, {width}]")
    if tokens == 0:
        return [np.empty((0, w.shape[0]), np.float32) for w in weights]
    outputs = [w.shape[0] for w in weights]
    y = np.empty(tokens * sum(outputs), np.float32)
    matrices = np.array([[address_of(w)] for w in weights])
    expert_ids, routing_weights, columns = _one_expert(tokens, width)
    run(variant, x, expert_ids, routing_weights, columns, matrices, np.array(outputs), False, y, y.size * width)
    ends = [tokens * end for end in accumulate(outputs)]
    return [y[end - tokens * rows : end].reshape(tokens, rows) for rows, end in zip(outputs, ends, strict=True)]


def per_head(x: np.ndarray, w: np.ndarray, variant: KernelVariant) -> np.ndarray:
    """Each head's x . its own w transposed: float32 [T, H, N].

    x: float32 [T, H, K]; w: uint16 bits [H, N, K], possibly a read-only mapping; `variant` as in `linear`.
    Raises ValueError when a shape, a data type or the memory order does not fit.
    """
    if x.ndim != 3 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, H, K]")
    tokens, heads, width = x.shape
    if w.ndim != 3 or w.dtype != np.uint16 or (w.shape[0], w.shape[2]) != (heads, width) or not w.flags.c_contiguous:
        raise ValueError(f"w is {w.dtype} {w.shape}; expected contiguous uint16 bits [{heads}, N, {width}]")
    y = np.empty(tokens * heads * w.shape[1], np.float32)
    if tokens:  # a head is the expert of its rows
        rows, columns, ones = np.tile(np.arange(heads), tokens)[:, None], np.full(heads, width), _ones(tokens * heads)
        matrices = ExpertMatrices.of(w).addresses[None]
        x, outputs = x.reshape(-1, width), np.array([w.shape[1]])
        run(variant, x, rows, ones, columns, matrices, outputs, False, y, y.size * width)
    return y.reshape(tokens, heads, w.shape[1])


@lru_cache(maxsize=64)
def _ones(rows: int) -> np.ndarray:
    return np.ones((rows, 1), np.float32)


@lru_cache(maxsize=64)
def _one_expert(tokens: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expert ids, routing weights and hidden rows of a dense product: every token has weight 1 in expert 0."""
    return np.zeros((tokens, 1), np.int64), np.ones((tokens, 1), np.float32), np.array([width])
