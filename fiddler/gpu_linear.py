"""Dense products and routing on the GPU. Knows the weights by name; not the model's structure.

Several tokens go through torch; one token, where the time is that of reading weights, through kernels of our own
where they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.mixtral import route

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GpuLinear", "GpuRouter"]

_WIDENED = 1 << 24  # elements of a weight that are widened to float32 at once


class GpuLinear:
    """The model's `Linear` for weights on the GPU."""

    def __init__(self, weights: Mapping[str, Tensor], one_token: ModuleType | None, *, exact: bool) -> None:
        """weights: by name; those of names that go `together` may be parts of one tensor, one after the other.

        one_token: `fiddler.gpu_kernels`, or None where it does not run. exact: float32 activations for bf16, too.
        """
        self._weights = weights
        self._kernels = one_token
        self._exact = exact

    def __call__(self, x: Tensor, name: str) -> Tensor:
        """A `Linear`'s: x [T, in] float32 -> [T, out] float32."""
        return self._product(x, self._weights[name])

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """A `Linear`'s: neighbours in memory are one product."""
        weights = [self._weights[name] for name in names]
        joined = _joined(weights)
        if joined is None:
            return [self._product(x, weight) for weight in weights]
        return list(self._product(x, joined).split([len(weight) for weight in weights], 1))

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return F.linear(x, weight)
        rounded = weight.dtype == torch.bfloat16 and not self._exact
        if len(x) == 1 and self._kernels is not None:
            made: Tensor = self._kernels.gemv(x, weight, rounded=rounded)
            return made
        if rounded:
            return F.linear(x.to(weight.dtype), weight).float()
        pieces = weight.split(max(1, _WIDENED // weight.shape[1]))
        return torch.cat([F.linear(x, piece.float()) for piece in pieces], 1)


def _joined(weights: Sequence[Tensor]) -> Tensor | None:
    """Weights [n, in] that lie one after the other in memory, as one; else None."""
    first, at = weights[0], weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != at or weight.dtype != first.dtype:
            return None
        at += weight.numel() * weight.element_size()
    rows = sum(len(weight) for weight in weights)
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < at:
        return None
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


class GpuRouter:
    """The model's `Router` on the GPU."""

    def __init__(self, one_token: ModuleType | None) -> None:
        self._kernels = one_token

    def __call__(self, x: Tensor, weight: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """A `Router`'s."""
        if len(x) == 1 and self._kernels is not None:
            made: tuple[Tensor, Tensor] = self._kernels.route_one(x, weight, k)
            return made
        return route(x, weight, k)
