"""Experts on the GPU in plain torch, for any number of tokens: residents, and parts that were streamed.

Knows tensors of weights and where residents lie; not who decides what is streamed. Works on any torch device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.cpu.layers import ExpertWeights
from fiddler.device.weight_copy import Link

__all__ = ["Job", "Residents", "feed_forward", "tokens_by_expert", "torch_type"]

_BYTES = 14  # of temporaries a token and hidden row: gate and up in 16 and 32 bits, and what becomes of them


class Job(NamedTuple):
    """Tokens [first, end), in the order by expert, for some hidden rows of one expert."""

    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows], multiples of 16
    rows: int
    first: int
    end: int


def torch_type(weights: ExpertWeights) -> torch.dtype:
    """The type of a layer's weights."""
    return torch.bfloat16 if weights.product.weights == "bf16" else torch.float16


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


class Residents:
    """The experts that live on the GPU."""

    def __init__(self, layers: Sequence[ExpertWeights], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._weights: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        experts = len(layers[0].gate)
        # for kernels that are told an expert's number on the device: addresses of its matrices and its rows, or 0
        self.table = torch.zeros(len(layers), experts, 5, dtype=torch.int64, device=device)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._weights

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        return self._weights[key]

    def __len__(self) -> int:
        return len(self._weights)

    def addresses(self, layer: int, expert: int) -> tuple[int, int, int]:
        """Of gate, up and down."""
        gate, up, down = self._weights[layer, expert]
        return gate.data_ptr(), up.data_ptr(), down.data_ptr()

    def complete(self, layer: int) -> bool:
        """Whether every expert of a layer is here."""
        return all((layer, e) in self._weights for e in range(len(self._layers[layer].gate)))

    def load(self, placed: Sequence[Sequence[int]], link: Link, progress: Callable[[int], None]) -> None:
        """Bring experts here, those of each layer; `progress` is told of bytes on their way."""
        table = self.table.cpu()
        for layer, experts in enumerate(placed):
            weights = self._layers[layer]
            hidden, width = weights.gate.shape[1:]
            for e in experts:
                # each matrix begins at a multiple of 16 bytes
                memory = torch.empty(3, -(-hidden * width // 8) * 8, dtype=torch_type(weights), device=self._device)
                gate, up, down = memory[:, : hidden * width]
                made = gate.view(hidden, width), up.view(hidden, width), down.view(width, hidden)
                for target, bits in zip(made, (weights.gate[e], weights.up[e], weights.down[e]), strict=True):
                    link.copy(target.data_ptr(), bits.ctypes.data, bits.nbytes)
                self._weights[layer, e] = made
                table[layer, e] = torch.tensor([*(matrix.data_ptr() for matrix in made), hidden, 0])
                progress(memory.nbytes)
        arrived = link.mark()
        link.arrive(arrived)
        arrived.synchronize()
        self.table.copy_(table)


def tokens_by_expert(ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """ids [T, K] -> how many tokens each expert has [E], and where they begin in the order by expert [E + 1]."""
    counts = np.bincount(ids.reshape(-1), minlength=experts)
    return counts, np.concatenate(([0], np.cumsum(counts)))
