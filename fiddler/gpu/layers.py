"""Dense products, norms and routing on the GPU. Knows the weights by name; not the model's structure.

Several tokens go through torch; one token, where the time is that of reading weights, through kernels of our own
where they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.router import rms_norm, route

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GpuLinear", "GpuNorm", "GpuRouter"]

_KEEPS_SUMS = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8: float32 sums of 16-bit products, not rounded again
_WIDENED = 1 << 24  # elements of a weight that are widened to float32 at once


class GpuLinear:
    """The model's `Linear` for weights on the GPU."""

    def __init__(self, weights: Mapping[str, Tensor], kernels: ModuleType | None, *, exact: bool) -> None:
        """weights: by name; those of names that go `together` may be parts of one tensor, one after the other.

        kernels: `fiddler.decode_kernels`, or None where it does not run. exact: float32 activations for bf16, too.
        """
        self._weights = weights
        self._kernels = kernels
        self._exact = exact

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """A `Linear`'s: x [T, in] float32 -> [T, out] float32."""
        return self._product(x, self._weights[name], onto)

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """A `Linear`'s: neighbours in memory are one product."""
        weights = [self._weights[name] for name in names]
        joined = _joined(weights)
        if joined is None:
            return [self._product(x, weight) for weight in weights]
        return list(self._product(x, joined).split([len(weight) for weight in weights], 1))

    def _product(self, x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
        rounded = weight.dtype == torch.bfloat16 and not self._exact
        if len(x) == 1 and self._kernels is not None:
            return cast(Tensor, self._kernels.gemv(x, weight, onto, rounded=rounded))
        if weight.dtype == torch.float32:
            made = F.linear(x, weight)
        elif rounded and _KEEPS_SUMS and x.is_cuda:
            made = torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        elif rounded:
            made = F.linear(x.to(weight.dtype), weight).float()
        else:
            pieces = weight.split(max(1, _WIDENED // weight.shape[1]))
            made = torch.cat([F.linear(x, piece.float()) for piece in pieces], 1)
        return made if onto is None else made.add_(onto)


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

    def __init__(self, kernels: ModuleType | None) -> None:
        self._kernels = kernels

    def __call__(
        self, h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A `Router`'s."""
        if self._kernels is not None:
            return cast(tuple[Tensor, Tensor, Tensor], self._kernels.route(h, norm, epsilon, weight, k))
        return route(h, norm, epsilon, weight, k)


class GpuNorm:
    """The model's `Norm` on the GPU."""

    def __init__(self, kernels: ModuleType | None) -> None:
        self._kernels = kernels

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """A `Norm`'s."""
        if self._kernels is not None:
            return cast(Tensor, self._kernels.norm(x, weight, epsilon))
        return rms_norm(x, weight, epsilon)
