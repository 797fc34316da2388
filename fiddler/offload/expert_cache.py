"""The experts that are resident on the GPU. Knows tensors and their addresses; not how they are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fiddler.device.weight_copy import WeightCopy
from fiddler.files.weights import ExpertWeights
from fiddler.kernels.token_copies import JOB
from fiddler.offload.expert_biases import first_row
from fiddler.offload.feed_forward import Matrix, matrix_in

__all__ = ["Residents"]


class Residents:
    """The experts that are resident on the GPU, by layer and expert id."""

    def __init__(self, layers: Sequence[ExpertWeights], device: torch.device) -> None:
        self._layers = layers
        self._device = device
        self._weights: dict[tuple[int, int], tuple[Matrix, Matrix, Matrix]] = {}
        self._memory: dict[tuple[int, int], Tensor] = {}  # of the three
        self._addresses: dict[tuple[int, int], tuple[int, int, int]] = {}
        experts = len(layers[0].gate)
        # for kernels with expert ids on the device, jobs as in `expert_kernels`; zeros: not resident
        self.table = torch.zeros(len(layers), experts, JOB, dtype=torch.int64, device=device)
        self.missing = np.ones((len(layers), experts), np.bool_)
        """bool [L, E], whether an expert is not resident; the same array at all times."""

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._weights

    def __getitem__(self, key: tuple[int, int]) -> tuple[Matrix, Matrix, Matrix]:
        return self._weights[key]

    def __len__(self) -> int:
        return len(self._weights)

    def addresses(self, layer: int, expert: int) -> tuple[int, int, int]:
        """Addresses of gate, up and down."""
        return self._addresses[layer, expert]

    def nbytes(self, layer: int, expert: int) -> int:
        """Size of a resident [bytes]."""
        return self._memory[layer, expert].nbytes

    def complete(self, layer: int) -> bool:
        """Whether every expert of a layer is resident."""
        return all((layer, e) in self._weights for e in range(len(self._layers[layer].gate)))

    def by_layer(self) -> list[list[int]]:
        """Expert ids of each layer, ascending."""
        return [[e for e in range(len(w.gate)) if (layer, e) in self._weights] for layer, w in enumerate(self._layers)]

    def evict(self, layer: int, expert: int) -> int:
        """Free an expert's memory; returns its size [bytes]. Kernels that are queued still find it there."""
        nbytes = self.nbytes(layer, expert)
        del self._weights[layer, expert], self._memory[layer, expert], self._addresses[layer, expert]
        self.table[layer, expert] = 0
        self.missing[layer, expert] = True
        return nbytes

    def load(self, placed: Sequence[Sequence[int]], weight_copy: WeightCopy, progress: Callable[[int], None]) -> None:
        """Copy the experts of each layer to the GPU; calls `progress` with the bytes of each expert on its way."""
        table = self.table.cpu()
        for layer, experts in enumerate(placed):
            weights = self._layers[layer]
            _, hidden, width = weights.shape
            shapes = (hidden, width), (hidden, width), (width, hidden)
            for e in experts:
                sources = weights.gate[e], weights.up[e], weights.down[e]
                # each matrix begins at a multiple of 16 bytes
                begins = [0, *accumulate(-(-source.nbytes // 16) * 16 for source in sources)]
                memory = torch.empty(begins[-1], dtype=torch.uint8, device=self._device)
                gate, up, down = (
                    matrix_in(memory, begin, *shape, kind)
                    for begin, shape, kind in zip(begins, shapes, weights.matrix_formats, strict=False)
                )
                at = memory.data_ptr()
                addresses = at, at + begins[1], at + begins[2]
                for target, source in zip(addresses, sources, strict=True):
                    weight_copy.copy(target, source.ctypes.data, source.nbytes)
                self._weights[layer, e], self._memory[layer, e] = (gate, up, down), memory
                self._addresses[layer, e] = addresses
                self.missing[layer, e] = False
                table[layer, e] = torch.tensor([*addresses, hidden, 0, first_row(layer, e, len(weights.gate), hidden)])
                progress(memory.nbytes)
        arrived = weight_copy.event()
        weight_copy.arrive(arrived)
        arrived.synchronize()
        self.table.copy_(table)
