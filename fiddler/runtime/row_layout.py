"""How a pool's memory holds a head's keys or values: plain floats, or blocks of Q8_0. Knows no blocks of a pool.

A row is one position's keys or values of one head; memory has `POSITIONS` rows of each head together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fiddler.runtime.q8_0_rows import BLOCK, codes_and_scales, decoded, encoded, row_bytes, values_of

__all__ = ["POSITIONS", "PlanarRows", "RowLayout"]

POSITIONS = 32  # in a block of a pool


@dataclass(frozen=True)
class RowLayout:
    """Rows one after the other. Of Q8_0 as `q8_0_rows` has them: each scale before its codes, as in files.

    dtype: of the memory: float16, float32, or uint8, which stands for Q8_0. read_as: the type in which attention
    through torch, or on a GPU, multiplies what it reads.
    """

    head_dim: int
    dtype: torch.dtype
    read_as: torch.dtype

    @classmethod
    def of(cls, head_dim: int, dtype: torch.dtype, read_as: torch.dtype | None = None) -> Self:
        """Rows of this type; read_as: None for that of `load`."""
        return cls(head_dim, dtype, read_as or _exact(dtype))

    @property
    def quantised(self) -> bool:
        """Whether rows are blocks of Q8_0."""
        return self.dtype == torch.uint8

    @property
    def exact(self) -> torch.dtype:
        """The type that has every number that is stored, which `load` gives."""
        return _exact(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the memory of `POSITIONS` rows of a head."""
        return POSITIONS, row_bytes(self.head_dim) if self.quantised else self.head_dim

    @property
    def nbytes(self) -> int:
        """Size of the memory of `POSITIONS` rows of a head [bytes]: the same in every layout."""
        return POSITIONS * (row_bytes(self.head_dim) if self.quantised else self.head_dim * self.dtype.itemsize)

    def store(self, heads: Tensor, numbers: Tensor, rows: Tensor, values: Tensor) -> None:
        """Write values [n, G, head_dim] to `heads` [blocks, G, *shape]: to rows, int64 [n], of the blocks `numbers`."""
        heads[numbers, :, rows] = encoded(values) if self.quantised else values.to(self.dtype)

    def load(self, heads: Tensor) -> Tensor:
        """Memory [..., *shape] -> its rows [..., POSITIONS, head_dim], of the type `exact`."""
        return decoded(heads) if self.quantised else heads

    def copy(self, source: Tensor, target: Tensor, positions: int) -> None:
        """Copy the first `positions` rows of each head, or more; both [..., *shape]."""
        target[..., :positions, :] = source[..., :positions, :]


class PlanarRows(RowLayout):
    """Q8_0 as a GPU reads it: the codes of all rows of a head, then all of their scales.

    int8 [POSITIONS, head_dim] and float16 [POSITIONS, head_dim / 32]: the addresses that a warp reads are consecutive
    and aligned, and 16 codes are one load.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Implements `RowLayout.shape`."""
        return (self.nbytes,)

    def store(self, heads: Tensor, numbers: Tensor, rows: Tensor, values: Tensor) -> None:
        """Implements `RowLayout.store`."""
        for plane, part in zip(self.planes(heads), codes_and_scales(values), strict=True):
            plane[numbers, :, rows] = part

    def load(self, heads: Tensor) -> Tensor:
        """Implements `RowLayout.load`."""
        return values_of(*self.planes(heads))

    def copy(self, source: Tensor, target: Tensor, positions: int) -> None:
        """Implements `RowLayout.copy`: all rows, which are few, in one copy."""
        target.copy_(source)

    def planes(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the memory [..., nbytes]: codes [..., POSITIONS, head_dim], scales [..., POSITIONS, blocks]."""
        end = POSITIONS * self.head_dim
        codes, scales = heads[..., :end].view(torch.int8), heads[..., end:].view(torch.float16)
        outer = heads.shape[:-1]
        return codes.view(*outer, POSITIONS, self.head_dim), scales.view(*outer, POSITIONS, self.head_dim // BLOCK)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.uint8 else dtype
