"""A quantised matrix in a device's memory, stored as its file has it. Knows formats; not what the matrix is for.

On a GPU a Triton kernel decodes it, on a CPU ours: tests use that where there is no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler import kernels
from fiddler.kernels.formats.weight_format import WeightFormat

__all__ = ["StoredMatrix"]


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [N, K], or a stack [H, N, K], of whole blocks. Also the model's `Embeddings`, looked up row by row."""

    stored: Tensor
    """uint8 [N, bytes of a row], or [H, N, bytes of a row]"""
    format: WeightFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return (*self.stored.shape[:-1], self.format.columns(self.stored.shape[-1]))

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.stored.device

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """These rows [T], as float32 [T, K]."""
        return self._decoded(self.stored, torch.float32, ids)

    def rows(self, begin: int, end: int) -> StoredMatrix:
        """A view of some rows."""
        return StoredMatrix(self.stored[begin:end], self.format)

    def decoded(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it."""
        return self._decoded(self.stored.flatten(0, -2), dtype).view(self.shape)

    def decoded_columns(self, begin: int, end: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Columns of whole blocks, [N, end - begin]."""
        part = self.stored[:, self.format.row_bytes(begin) : self.format.row_bytes(end)]
        return self._decoded(part.contiguous(), dtype)

    def _decoded(self, stored: Tensor, dtype: torch.dtype, ids: Tensor | None = None) -> Tensor:
        if stored.device.type == "cuda":
            from fiddler.offload.block_kernels import decode_rows  # needs Triton

            return decode_rows(stored, self.format.name, dtype, ids)
        some = stored if ids is None else stored[ids]
        return torch.from_numpy(kernels.decode_stored(some.numpy(), self.format.name, kernels.choose_tier())).to(dtype)
