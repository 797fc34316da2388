"""Linears and norms on the GPU. Knows the weights by name; not the model's structure.

Several tokens go through torch, one token through our Triton kernels where they run: there, reading weights takes all
the time. Norms use our kernel for any number of tokens, as the router does (`router_kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.router import rms_norm
from fiddler.offload.feed_forward import Matrix
from fiddler.offload.stored_matrix import StoredMatrix

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["GpuLinear", "GpuNorm"]

_HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8: mm returns its float32 sums without rounding them
_WIDENED = 1 << 24  # elements of a weight that one product widens to float32


class GpuLinear:
    """The model's `Linear` for weights on the GPU."""

    def __init__(self, weights: Mapping[str, Matrix], kernels: ModuleType | None, *, exact: bool) -> None:
        """weights: by name; weights that go `together` may be consecutive parts of one tensor.

        kernels: `fiddler.gpu.decode_kernels`, or None where it does not run. exact: float32 activations with bf16
        and quantised weights, too; else they are rounded to bf16, or one token's with quantised weights to int8.
        """
        self._weights = weights
        self._kernels = kernels
        self._exact = exact

    def __call__(self, x: Tensor, name: str, onto: Tensor | None = None) -> Tensor:
        """Implements `Linear`: x [T, in] float32 -> [T, out] float32."""
        return self._matmul(x, self._weights[name], onto)

    def together(self, x: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Implements `Linear.together`: one product for weights that are consecutive in memory."""
        weights = [self._weights[name] for name in names]
        joined = _joined(weights)
        if joined is None:
            int8 = self._int8(x, weights)
            return [self._matmul(x, weight, int8=int8) for weight in weights]
        return list(self._matmul(x, joined).split([len(weight) for weight in weights], 1))

    def feed_forward(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Implements `Linear.feed_forward`."""
        gate, up = self.together(x, names[:2])
        return self(F.silu(gate) * up, names[2])

    def per_head(self, x: Tensor, name: str) -> Tensor:
        """Implements `Linear.per_head`, in float32; several tokens some heads at a time."""
        weight = self._weights[name]
        assert isinstance(weight, Tensor), "matrices of heads are decoded when they are loaded"
        if len(x) == 1 and self._kernels is not None:
            return cast(Tensor, self._kernels.gemv_per_head(x, weight))
        step = max(1, _WIDENED // weight[0].numel())
        products, each = [], x.transpose(0, 1)  # [H, T, in]
        for begin in range(0, len(weight), step):
            heads = slice(begin, begin + step)
            products.append(torch.bmm(each[heads], weight[heads].float().mT))
        return torch.cat(products).transpose(0, 1)

    def _int8(self, x: Tensor, weights: Sequence[Matrix]) -> Tensor | None:
        """One token, rounded to int8 where one of the weights is multiplied by that."""
        if len(x) != 1 or self._kernels is None or self._exact:
            return None
        stored = [each for each in weights if isinstance(each, StoredMatrix)]
        if not stored:
            return None
        from fiddler.gpu import int8_activations, int8_gemv  # need Triton

        return int8_activations.rounded(x) if any(map(int8_gemv.multiplies, stored)) else None

    def _matmul(self, x: Tensor, weight: Matrix, onto: Tensor | None = None, *, int8: Tensor | None = None) -> Tensor:
        """int8: x rounded by `_int8`, if somebody did."""
        if isinstance(weight, StoredMatrix):
            if len(x) == 1 and self._kernels is not None:
                return self._multiply_one(x, weight, onto, self._int8(x, [weight]) if int8 is None else int8)
            return self._matmul_stored(x, weight, onto)
        rounded = weight.dtype == torch.bfloat16 and not self._exact
        if len(x) == 1 and self._kernels is not None:
            return cast(Tensor, self._kernels.gemv(x, weight, onto, rounded=rounded))
        if weight.dtype == torch.float32:
            y = F.linear(x, weight)
        elif rounded and _HAS_OUT_DTYPE and x.is_cuda:
            y = torch.mm(x.to(weight.dtype), weight.t(), out_dtype=torch.float32)
        elif rounded:
            y = F.linear(x.to(weight.dtype), weight).float()
        else:
            blocks = weight.split(max(1, _WIDENED // weight.shape[1]))
            y = torch.cat([F.linear(x, block.float()) for block in blocks], 1)
        return y if onto is None else y.add_(onto)

    def _multiply_one(self, x: Tensor, weight: StoredMatrix, onto: Tensor | None, int8: Tensor | None) -> Tensor:
        """One token with quantised weights. int8: x rounded, where a product takes it."""
        from fiddler.gpu import block_gemv, int8_gemv  # need Triton

        if int8 is not None and int8_gemv.multiplies(weight):
            return int8_gemv.gemv(int8, weight, onto)
        return block_gemv.gemv(x, weight.stored, weight.format, onto)

    def _matmul_stored(self, x: Tensor, weight: StoredMatrix, onto: Tensor | None) -> Tensor:
        """`_matmul` with quantised weights, which several tokens decode, some rows at a time."""
        dtype = torch.float32 if self._exact else torch.bfloat16
        step = max(1, _WIDENED // weight.shape[1])
        blocks = (weight.rows(begin, begin + step).decoded(dtype) for begin in range(0, len(weight), step))
        exact = self._exact or not (_HAS_OUT_DTYPE and x.is_cuda)
        a = x.to(dtype)
        y = torch.cat(
            [
                F.linear(a, block).float() if exact else torch.mm(a, block.t(), out_dtype=torch.float32)
                for block in blocks
            ],
            1,
        )
        return y if onto is None else y.add_(onto)


def _joined(weights: Sequence[Matrix]) -> Matrix | None:
    """Weights [n, in] that are consecutive in memory and stored alike, as one; else None."""
    plain = [each for each in weights if isinstance(each, Tensor)]
    stored = [each for each in weights if isinstance(each, StoredMatrix)]
    if not stored:
        return _joined_tensors(plain)
    if plain or len({each.format.name for each in stored}) > 1:
        return None
    joined = _joined_tensors([each.stored for each in stored])
    return None if joined is None else StoredMatrix(joined, stored[0].format)


def _joined_tensors(weights: Sequence[Tensor]) -> Tensor | None:
    first, address = weights[0], weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != address or weight.dtype != first.dtype:
            return None
        address += weight.numel() * weight.element_size()
    rows = sum(len(weight) for weight in weights)
    if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() < address:
        return None
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


class GpuNorm:
    """The model's `Norm` on the GPU."""

    def __init__(self, kernels: ModuleType | None) -> None:
        self._kernels = kernels

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Implements `Norm`."""
        if self._kernels is not None:
            return cast(Tensor, self._kernels.norm(x, weight, epsilon))
        return rms_norm(x, weight, epsilon)
