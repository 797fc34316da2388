"""A weight format as a value: how a row of weights is stored. Knows no format by name, and no instructions.

`PlainFormat` stores each weight by itself, `BlockFormat` (in `block_format.py`) blocks of weights with scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from fiddler.kernels.codegen.llvm import I32
from fiddler.kernels.codegen.variant import KernelVariant

__all__ = ["PlainFormat", "WeightFormat"]


@dataclass(frozen=True)
class WeightFormat:
    """How weights of one GGUF type lie in memory, and what the kernels do with them.

    A row is a sequence of blocks, each with `block_length` neighbouring weights in `block_bytes` bytes; rows follow
    each other without a gap.
    """

    name: str
    """GGUF's name of the type, in lower case."""
    block_length: int
    block_bytes: int
    partner: str
    """The activations that it is multiplied with unless more exact ones are wanted: "bf16" (in pairs), "f32" or "q8"
    (blocks of int8)."""

    def row_bytes(self, columns: int) -> int:
        """Size of a row of `columns` weights [bytes]; raises ValueError where they are no whole blocks."""
        blocks, remainder = divmod(columns, self.block_length)
        if remainder:
            raise ValueError(f"a row of {columns} {self.name} weights is no multiple of {self.block_length}, a block")
        return blocks * self.block_bytes

    def columns(self, row_bytes: int) -> int:
        """Weights of a row of so many bytes: the opposite of `row_bytes`."""
        return row_bytes // self.block_bytes * self.block_length

    @property
    def dtype(self) -> np.dtype:
        """The numpy type of a view of stored weights: float32, uint16 bits, or uint8 of whole blocks."""
        return np.dtype({"f32": np.float32, "bf16": np.uint16, "f16": np.uint16}.get(self.name, np.uint8))

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a view of weights [..., K] in elements of `dtype`; raises ValueError as `row_bytes`."""
        return (*shape[:-1], self.row_bytes(shape[-1]) // self.dtype.itemsize)

    def shape(self, stored: np.ndarray) -> tuple[int, ...]:
        """The shape of the weights of a view: the opposite of `stored_shape`."""
        return (*stored.shape[:-1], self.columns(stored.shape[-1] * self.dtype.itemsize))


@dataclass(frozen=True)
class PlainFormat(WeightFormat):
    """Each weight is a number by itself."""

    decode: Callable[[ir.IRBuilder, KernelVariant, ir.Value], ir.Value]
    """Generates the code that decodes a vector of stored weights to a vector of float32."""

    @property
    def weight_bytes(self) -> int:
        """Size of a weight [bytes]."""
        return self.block_bytes

    def decode_one(self, b: ir.IRBuilder, variant: KernelVariant, stored: ir.Value) -> ir.Value:
        """Generates the code that decodes one stored weight to float32."""
        vector = self.decode(b, variant, b.bitcast(stored, ir.VectorType(stored.type, 1)))
        return b.extract_element(vector, ir.Constant(I32, 0))
