"""The feed-forward of all selected experts of one layer at once, from weights in place.

y[t] = sum over j of routing_weights[t, j] * down_e . (silu(gate_e . x[t]) * (up_e . x[t])),  e = expert_ids[t, j].

One parallel region: gate, up and their product; then, when all of these are there, down and the weighted sum. Each
splits the *rows* of every selected expert over all threads, so no thread waits for a busier expert. One task computes
each output element in one order, so the result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.expert_matrices import ExpertMatrices, bias_addresses, check_experts
from fiddler.kernels.formats import format_of
from fiddler.kernels.matmul.blocks import stored_kinds
from fiddler.kernels.matmul.epilogues import CLAMPED, SWIGLU
from fiddler.kernels.matmul.products_call import BoundProducts, ProductsCall

__all__ = ["ExpertFfn", "expert_ffn"]


def expert_ffn(
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    gate: ExpertMatrices | np.ndarray,
    up: ExpertMatrices | np.ndarray,
    down: ExpertMatrices | np.ndarray,
    variant: KernelVariant | tuple[KernelVariant, KernelVariant, KernelVariant],
    hidden_rows: np.ndarray | None = None,
    out: np.ndarray | None = None,
    *,
    clamped: bool = False,
) -> np.ndarray:
    """Weighted sum of each token's experts: float32 [T, D].

    x: float32 [T, D]; expert_ids: integer [T, K]; routing_weights: float32 [T, K].
    gate, up: stored weights [E, F, D], as `WeightFormat.stored_shape`; down: [E, D, F]; each as one array, possibly a
    read-only mapping, or as `ExpertMatrices`, whose experts may lie apart. `variant` says how they are read and to
    which type activations are rounded: x before the first products, the SwiGLU product before the second; three
    variants where gate, up and down have quantised formats of their own.
    hidden_rows: int64 [E], even numbers, or whole blocks of down: how many of each expert's F hidden rows are computed,
    from the first on, that is, rows of gate and up and columns of down. Another device computes the rest of the sum.
    out: float32 [T, D], written and returned in place of a new array. clamped: the activation is
    `epilogues.clamped_swiglu`. Biases of `ExpertMatrices` are added to their products, those of down unless
    hidden_rows are 0.
    Raises ValueError when a shape, a data type, the memory order or an expert id does not fit.
    """
    return ExpertFfn(gate, up, down, variant, clamped=clamped)(x, expert_ids, routing_weights, hidden_rows, out)


class ExpertFfn:
    """`expert_ffn` of one layer, whose weights are checked once: a call takes microseconds less."""

    def __init__(
        self,
        gate: ExpertMatrices | np.ndarray,
        up: ExpertMatrices | np.ndarray,
        down: ExpertMatrices | np.ndarray,
        variant: KernelVariant | tuple[KernelVariant, KernelVariant, KernelVariant],
        *,
        clamped: bool = False,
    ) -> None:
        """The arguments are those of `expert_ffn`. Raises ValueError where they do not fit."""
        gate, up, down = (
            each if isinstance(each, ExpertMatrices) else ExpertMatrices.of(each) for each in (gate, up, down)
        )
        variants = (variant,) * 3 if isinstance(variant, KernelVariant) else variant
        experts, hidden, _ = gate.shape
        width = down.shape[1]
        shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
        named = zip(("gate", "up", "down"), (gate, up, down), variants, shapes, strict=True)
        for name, stored, each, shape in named:
            check_experts(name, stored, shape, each)
        if len({each.grouping for each in variants}) > 1:
            raise ValueError("gate, up and down have formats that one call cannot multiply")
        self._experts, self._hidden, self._width = experts, hidden, width
        self._block_length = format_of(variants[2]).block_length
        self._products = ProductsCall(variants[0].grouping)
        self._weights = gate, up, down  # their addresses are read
        self._biases = bias_addresses(self._weights)
        self._activation = CLAMPED if clamped else SWIGLU
        self._matrices = np.array((gate.addresses, up.addresses, down.addresses))
        self._stored = stored_kinds(variants, (width, width, hidden))
        self._outputs, self._all_rows = np.array([hidden, hidden, width]), np.full(experts, hidden, np.int64)

    def __call__(
        self,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
        hidden_rows: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """See `expert_ffn`."""
        self._check(x, expert_ids, routing_weights)
        if hidden_rows is None:
            hidden_rows = self._all_rows
        else:
            _check_rows(hidden_rows, self._experts, self._hidden, self._block_length)
        y = np.empty((len(x), self._width), np.float32) if out is None else out
        self._check_out(y, len(x))
        if not self._products(
            (
                np.ascontiguousarray(x),
                np.ascontiguousarray(expert_ids, np.int64),
                np.ascontiguousarray(routing_weights, np.float32),
                np.ascontiguousarray(hidden_rows),
                *self._weights_and(y),
            ),
            3 * expert_ids.size * self._width * self._hidden,
        ):
            raise ValueError(f"an expert id lies outside 0..{self._experts - 1}")
        return y

    def bind(
        self,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
        hidden_rows: np.ndarray,
        out: np.ndarray,
    ) -> BoundProducts:
        """A call with arrays that are checked once, and filled anew before each call.

        The arguments are those of `expert_ffn`, but contiguous, and expert_ids int64. The caller answers for the values
        of hidden_rows: even, or whole blocks of down, and from 0 to F. The call is False if an expert id is out of
        range.
        """
        self._check(x, expert_ids, routing_weights)
        _check_rows(hidden_rows, self._experts, self._hidden, self._block_length)
        self._check_out(out, len(x))
        kinds = np.float32, np.int64, np.float32, np.int64
        for array, kind in zip((x, expert_ids, routing_weights, hidden_rows), kinds, strict=True):
            if array.dtype != kind or not array.flags.c_contiguous:
                raise ValueError(f"an array to bind is {array.dtype} {array.shape}; expected {kind}, contiguous")
        arguments = x, expert_ids, routing_weights, hidden_rows, *self._weights_and(out)
        return self._products.bind(arguments, 3 * expert_ids.size * self._width * self._hidden)

    def _weights_and(self, out: np.ndarray) -> tuple[Any, ...]:
        """The arguments of `grouped_products` from `matrices` to `biases`."""
        weights = self._matrices, self._stored, self._outputs, self._activation
        return *weights, out.reshape(-1), self._biases

    def _check_out(self, out: np.ndarray, tokens: int) -> None:
        shape = tokens, self._width
        if out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}; expected contiguous float32 {shape}")

    def _check(self, x: np.ndarray, expert_ids: np.ndarray, routing_weights: np.ndarray) -> None:
        if x.ndim != 2 or x.dtype != np.float32 or x.shape[1] != self._width:
            raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, {self._width}]")
        if (
            expert_ids.ndim != 2
            or expert_ids.shape[0] != x.shape[0]
            or expert_ids.dtype.kind not in "iu"
            or routing_weights.shape != expert_ids.shape
        ):
            raise ValueError(
                f"expert_ids are {expert_ids.dtype} {expert_ids.shape}, routing_weights {routing_weights.shape}; "
                f"expected [{x.shape[0]}, K] both"
            )


def _check_rows(hidden_rows: np.ndarray, experts: int, hidden: int, block_length: int) -> None:
    if hidden_rows.shape != (experts,) or hidden_rows.dtype != np.int64:
        raise ValueError(f"hidden_rows are {hidden_rows.dtype} {hidden_rows.shape}; expected int64 [{experts}]")
    for rows in set(hidden_rows.tolist()):  # few different ones
        if not 0 <= rows <= hidden:
            raise ValueError(f"hidden_rows lie outside 0..{hidden}")
        if rows % block_length:
            raise ValueError(f"hidden_rows split blocks of {block_length} weights; give multiples")
        if rows % 2 and rows != hidden:
            raise ValueError("hidden_rows are odd, which splits bf16 pairs; give even numbers")
