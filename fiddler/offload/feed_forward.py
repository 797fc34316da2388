"""Experts on the GPU in plain torch, for any number of tokens: residents and streamed parts.

Knows tensors of weights; not how residents and streamed parts are chosen. Works on any torch device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.offload.stored_matrix import StoredMatrix

__all__ = ["Job", "Matrix", "feed_forward", "matrix_in", "tokens_by_expert", "torch_type"]

_BYTES = 14  # of temporaries a token and hidden row: gate and up in 16 and 32 bits, and the values computed from them

_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}  # of each weight format that torch has


Matrix = Tensor | StoredMatrix
"""Weights [N, K] in a device's memory: 16-bit or float32 numbers, or quantised."""


class Job(NamedTuple):
    """Tokens [first, end), in the order by expert, for some hidden rows of one expert."""

    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows], multiples of 16
    rows: int
    first: int
    end: int
    biases: int = 0  # index of the first hidden row's, see `expert_biases.first_row`


def torch_type(weights: ExpertWeights) -> torch.dtype:
    """The type of a layer's weights; of quantised ones that to which activations and weights may be rounded."""
    return torch.bfloat16 if weights.quantised else _TYPES[weights.format.name]


def matrix_in(memory: Tensor, offset: int, rows: int, columns: int, kind: WeightFormat) -> Matrix:
    """A view of a matrix [rows, columns] in the format `kind`, `offset` bytes into memory (uint8)."""
    row_bytes = kind.row_bytes(columns)
    stored = memory[offset : offset + rows * row_bytes]
    if kind.name in _TYPES:
        return stored.view(_TYPES[kind.name]).view(rows, columns)
    return StoredMatrix(stored.view(rows, row_bytes), kind)


def feed_forward(
    x: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    *,
    rounded: bool,
    work: int,
    biases: tuple[Tensor, Tensor] | None = None,
    clamped: bool = False,
) -> Tensor:
    """down . (silu(gate . x) * (up . x)): x [t, D] -> [t, D] float32, for any of an expert's hidden rows.

    gate, up: [rows, D]; down: [D, rows]. rounded: x is in the weights' type, products are of 16 bits with float32
    sums; else everything is float32, x and the widened weights. work: workspace for temporaries [bytes], roughly.
    Quantised weights are decoded to the type of x. biases: float32 [rows], of the products with gate and up.
    clamped: the activation is `Activation.CLAMPED`.
    """
    if (
        isinstance(gate, Tensor)
        and isinstance(up, Tensor)
        and isinstance(down, Tensor)
        and (rounded or gate.dtype == torch.float32)
    ):
        return _products(x, gate, up, down, work, biases, clamped=clamped)
    # widened a few rows at a time: their results add up
    max_rows = max(256, work // (12 * gate.shape[1]) // 256 * 256)
    total = torch.zeros(x.shape, device=x.device)
    for begin in range(0, len(gate), max_rows):
        end = min(begin + max_rows, len(gate))
        some = None if biases is None else (biases[0][begin:end], biases[1][begin:end])
        total += _products(x, *_widened(gate, up, down, begin, end, x.dtype), work, some, clamped=clamped)
    return total


def _products(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    work: int,
    biases: tuple[Tensor, Tensor] | None,
    *,
    clamped: bool,
) -> Tensor:
    """`feed_forward` with weights in the type of x."""
    max_tokens = max(64, work // (_BYTES * len(gate)))
    outputs = []
    for piece in x.split(max_tokens):
        g, u = F.linear(piece, gate).float(), F.linear(piece, up)
        if biases is not None:
            g, u = g.add_(biases[0]), u.float().add_(biases[1])
        h = _clamped(g, u.float()) if clamped else F.silu(g).mul_(u)
        outputs.append(F.linear(h.to(gate.dtype), down).float())
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _clamped(g: Tensor, u: Tensor) -> Tensor:
    """`Activation.CLAMPED` of float32 products, in their memory."""
    g, u = g.clamp_(max=7.0), u.clamp_(-7.0, 7.0).add_(1.0)
    return torch.sigmoid(1.702 * g).mul_(g).mul_(u)


def _widened(
    gate: Matrix, up: Matrix, down: Matrix, begin: int, end: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows [begin, end) of an expert, in `dtype`."""
    of_gate, of_up = (
        each.rows(begin, end).decoded(dtype) if isinstance(each, StoredMatrix) else each[begin:end].to(dtype)
        for each in (gate, up)
    )
    if isinstance(down, StoredMatrix):
        return of_gate, of_up, down.decoded_columns(begin, end, dtype)
    return of_gate, of_up, down[:, begin:end].to(dtype)


def tokens_by_expert(expert_ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """expert_ids [T, K] -> tokens of each expert [E], and their first position in the order by expert [E + 1]."""
    counts = np.bincount(expert_ids.reshape(-1), minlength=experts)
    return counts, np.concatenate(([0], np.cumsum(counts)))
