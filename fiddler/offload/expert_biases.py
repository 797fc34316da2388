"""The biases of all layers' experts in a device's memory, float32. Knows tensors; not which experts are resident.

Those of gate and up belong to hidden rows: whoever computes rows adds theirs. Those of down belong to a whole expert,
whose rows may be divided: they are added once for each chosen expert, by the GPU, wherever its rows are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiddler.files.weights import ExpertWeights

__all__ = ["ExpertBiases", "JobBiases", "first_row"]


class JobBiases(NamedTuple):
    """Biases as kernels read them."""

    gate: Tensor
    """float32 [L * E * F]: those of a job's hidden rows begin at the job's index, see `first_row`."""
    up: Tensor
    """Likewise."""
    down: Tensor | None = None
    """float32 [E, D], a layer's, to add for each chosen expert; None: somebody else does."""


def first_row(layer: int, expert: int, experts: int, hidden: int, begin: int = 0) -> int:
    """The index of an expert's hidden row `begin` among those of all layers, of `experts` with `hidden` rows each."""
    return (layer * experts + expert) * hidden + begin


class ExpertBiases:
    """Biases of gate and up [L, E, F] and of down [L, E, D]."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self._gate, self._up, self._down = gate, up, down

    @classmethod
    def of(cls, layers: Sequence[ExpertWeights], device: torch.device) -> ExpertBiases | None:
        """Copy the biases of these layers to `device`; None where they have none."""
        if not cls.nbytes(layers):
            return None
        gate, up, down = (
            _on_device([bias for bias in biases if bias is not None], device)
            for biases in zip(*((w.gate.bias, w.up.bias, w.down.bias) for w in layers), strict=True)
        )
        return cls(gate, up, down)

    @staticmethod
    def nbytes(layers: Sequence[ExpertWeights]) -> int:
        """Memory that they take [bytes]."""
        biases = (each.bias for w in layers for each in (w.gate, w.up, w.down))
        return sum(bias.nbytes for bias in biases if bias is not None)

    @property
    def hidden(self) -> JobBiases:
        """For jobs of any layer: those of gate and up."""
        return JobBiases(self._gate.view(-1), self._up.view(-1))

    def of_layer(self, layer: int) -> JobBiases:
        """For kernels that are handed the ids of all chosen experts of a layer: those of down, too."""
        return self.hidden._replace(down=self._down[layer])

    def of_rows(self, layer: int, expert: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Those of gate and up of hidden rows [begin, end) of an expert."""
        return self._gate[layer, expert, begin:end], self._up[layer, expert, begin:end]

    def add_down(self, layer: int, expert_ids: Tensor, routing_weights: Tensor, y: Tensor) -> None:
        """Add to y [T, D] those of down of each token's experts: expert_ids (distinct) and routing_weights [T, K]."""
        weights = torch.zeros(len(y), self._down.shape[1], device=y.device)
        y.addmm_(weights.scatter_(1, expert_ids, routing_weights), self._down[layer])


def _on_device(biases: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Arrays of one shape, one for each layer, as one tensor."""
    stacked = torch.empty(len(biases), *biases[0].shape, device=device)
    for target, bias in zip(stacked, biases, strict=True):
        target.copy_(torch.from_numpy(np.array(bias)))  # a copy: torch takes no read-only mapping
    return stacked
