"""What a step asks of a sequence's keys and values. Knows no layout in memory: see `paged_kv_cache`."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fiddler.models.attention import Rows

__all__ = ["KVCache"]


class KVCache(ABC):
    """Keys and values of one sequence, all layers, of up to `context` positions; `length` of them are computed."""

    context: int
    length: int
    device: torch.device

    @abstractmethod
    def reserve(self, length: int) -> None:
        """Make room for positions up to `length`. Raises ResourceError where there is none."""

    @abstractmethod
    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Rows, Rows]:
        """Store keys and values [n, G, head_dim] behind the end, without moving it; all so far, [S, G, head_dim].

        In latent attention the keys alone, which are the values, too.
        """

    @abstractmethod
    def stored(self, layer: int) -> list[Tensor]:
        """A layer's keys and values so far, each [S, G, head_dim]; in latent attention one tensor, which is both."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on."""

    def advance(self, count: int) -> None:
        """Lengthen the sequence by positions that were written in every layer."""
        self.length += count
