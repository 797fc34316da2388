"""How often each expert is chosen: counted where a model hands its tokens to its experts. Knows no files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fiddler.models.mixtral import Experts, Mixtral

__all__ = ["CountedExperts", "counting"]


class CountedExperts:
    """A model's `Experts`, wherever they live, and how many tokens each has had."""

    def __init__(self, experts: Experts, layers: int, count: int, device: torch.device) -> None:
        """count: experts a layer. device: where the model chooses."""
        self._experts = experts
        self._counts = torch.zeros(layers, count, dtype=torch.int64, device=device)

    def __call__(self, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The model's `Experts`."""
        chosen = ids.reshape(-1)
        self._counts[layer].index_add_(0, chosen, torch.ones_like(chosen))  # unlike bincount, waits for no GPU
        return self._experts(layer, x, ids, weights)

    @property
    def counts(self) -> list[list[int]]:
        """[L][E], so far."""
        found: list[list[int]] = self._counts.tolist()
        return found


@contextmanager
def counting(model: Mixtral) -> Iterator[CountedExperts]:
    """Counts what `model` chooses in the block.

    Steps of one token on a GPU may run as graphs that were captured before, and are not counted there.
    """
    config, plain = model.config, model.experts
    counted = CountedExperts(plain, config.block_count, config.expert_count, model.token_embd.device)
    model.experts = counted
    try:
        yield counted
    finally:
        model.experts = plain
