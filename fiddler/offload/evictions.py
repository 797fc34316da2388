"""Evicts residents of least value while others need the GPU's memory, and loads them again, the last one first.

Knows residents and how often experts were chosen; not who needs the memory, nor how much there is.
"""

from __future__ import annotations

import torch

from fiddler.offload.orchestrator import Orchestrator
from fiddler.offload.residency import least_valuable

__all__ = ["Evictions"]


class Evictions:
    """Exchanges of residents between two steps. Layers that are complete stay so: captured graphs rely on it."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self._residents, self._weight_copy = orchestrator.residents, orchestrator.ring.weight_copy
        self._prefetcher = orchestrator.prefetcher
        self._fixed = [orchestrator.complete(layer) for layer in range(len(orchestrator.layers))]
        self._evicted: list[tuple[int, int]] = []
        self._nbytes = 0  # of an expert that was evicted

    @property
    def evicted(self) -> int:
        """Number of residents that gave their memory."""
        return len(self._evicted)

    @property
    def nbytes(self) -> int:
        """Size of an evicted expert [bytes]; 0 before the first."""
        return self._nbytes

    @property
    def evictable(self) -> int:
        """Memory of the residents that may go [bytes]."""
        return sum(
            self._residents.nbytes(layer, e)
            for layer, experts in enumerate(self._residents.by_layer())
            if not self._fixed[layer]
            for e in experts
        )

    def evict(self) -> bool:
        """Free the memory of the resident of least value; False where none may go."""
        least = least_valuable(self._residents.by_layer(), self._prefetcher.counts.tolist(), self._fixed)
        if least is None:
            return False
        self._nbytes = max(self._nbytes, self._residents.evict(*least))
        self._evicted.append(least)
        return True

    def restore(self) -> bool:
        """Load the expert that was evicted last; False where the memory is not there."""
        layer, expert = self._evicted[-1]
        if self._weight_copy.device.type == "cuda":
            torch.cuda.synchronize()  # queued kernels read that memory, and copies have a stream of their own
        placed: list[list[int]] = [[] for _ in self._fixed]
        placed[layer] = [expert]
        try:
            self._residents.load(placed, self._weight_copy, lambda nbytes: None)
        except torch.OutOfMemoryError:
            return False
        self._evicted.pop()
        return True
