"""Stored weights as float32, row by row: what an embedding looks up, and what an oracle of the kernels needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.formats import FORMATS, stored_bytes
from fiddler.kernels.machine.isa import Tier
from fiddler.kernels.machine.workspace import address_of
from fiddler.kernels.matmul.decoded_rows import decode_row
from fiddler.kernels.matmul.outer_tiles import widen_row

__all__ = ["StoredRows", "decode_stored"]


@kernel(parallel=False)
def _decode(variant: KernelVariant, source: int, target: int, rows: int, columns: int) -> None:
    row_bytes = stored_bytes(variant, columns)
    for r in range(rows):
        decode_row(variant, source + r * row_bytes, target + 4 * r * columns, columns, row_bytes)


@kernel(parallel=False)
def _widen(variant: KernelVariant, source: int, target: int, rows: int, columns: int) -> None:
    row_bytes = stored_bytes(variant, columns)
    for r in range(rows):
        widen_row(variant, source + r * row_bytes, target + 4 * r * columns, columns, row_bytes)


@dataclass(frozen=True)
class StoredRows:
    """A matrix of stored weights whose rows are decoded as they are looked up: embeddings."""

    stored: np.ndarray
    kind: str
    tier: Tier

    dtype = np.dtype(np.float32)
    """Of the rows that it returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights."""
        return FORMATS[self.kind].shape(self.stored)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """These rows as float32 [rows, K]."""
        return decode_stored(self.stored[rows], self.kind, self.tier)


def decode_stored(stored: np.ndarray, kind: str, tier: Tier) -> np.ndarray:
    """Weights in the format `kind` (as `WeightFormat.stored_shape`) -> float32 [..., K].

    Every bit is as the `gguf` package computes it; a NaN is a NaN.
    Raises ValueError where the data type or the row length does not fit the format.
    """
    weight_format, variant = FORMATS[kind], KernelVariant(tier, kind, "f32")
    stored = np.ascontiguousarray(stored)
    if stored.dtype != weight_format.dtype or weight_format.stored_shape(weight_format.shape(stored)) != stored.shape:
        raise ValueError(f"{stored.dtype} {stored.shape} are no rows of {kind}")
    out = np.empty(weight_format.shape(stored), np.float32)
    if out.size:
        columns = out.shape[-1]
        decode = _decode if variant.quantised else _widen
        decode(variant, address_of(stored), address_of(out), out.size // columns, columns)
    return out
