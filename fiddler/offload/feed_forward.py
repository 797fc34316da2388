"""Experts on the GPU in plain torch, for any number of tokens: residents, and parts that were streamed.

Knows tensors of weights and where residents lie; not who decides what is streamed. Works on any torch device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.files.weights import ExpertWeights

__all__ = ["Job", "feed_forward", "tokens_by_expert", "torch_type"]

_BYTES = 14  # of temporaries a token and hidden row: gate and up in 16 and 32 bits, and what becomes of them


class Job(NamedTuple):
    """Tokens [first, end), in the order by expert, for some hidden rows of one expert."""

    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows], multiples of 16
    rows: int
    first: int
    end: int


def torch_type(weights: ExpertWeights) -> torch.dtype:
    """The type of a layer's weights."""
    return torch.bfloat16 if weights.variant.weights == "bf16" else torch.float16


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, *, rounded: bool, work: int) -> Tensor:
    """down . (silu(gate . x) * (up . x)): x [t, D] -> [t, D] float32, for any of an expert's hidden rows.

    gate, up: [rows, D]; down: [D, rows]. rounded: x is in the weights' type, products are of 16 bits with float32
    sums; else x is float32 and so is everything, the weights widened. work: bytes for temporaries, more or less.
    """
    if not rounded and gate.dtype != torch.float32:  # widened a few rows at a time, whose sums add up
        some = max(64, work // (12 * gate.shape[1]))
        total = torch.zeros_like(x)
        for rows in (slice(begin, begin + some) for begin in range(0, len(gate), some)):
            wide = gate[rows].float(), up[rows].float(), down[:, rows].float()
            total += feed_forward(x, *wide, rounded=False, work=work)
        return total
    many = max(64, work // (_BYTES * len(gate)))
    made = []
    for piece in x.split(many):
        h = F.silu(F.linear(piece, gate).float()).mul_(F.linear(piece, up))
        made.append(F.linear(h.to(gate.dtype), down).float())
    return made[0] if len(made) == 1 else torch.cat(made)


def tokens_by_expert(expert_ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [T, K] -> how many tokens each expert has [E], and where they begin in the order by expert [E + 1]."""
    counts = np.bincount(expert_ids.reshape(-1), minlength=experts)
    return counts, np.concatenate(([0], np.cumsum(counts)))
