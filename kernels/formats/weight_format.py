"""A weight format as a value: how a row of weights is stored, decoded and multiplied. Knows no format by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from fiddler.kernels.codegen.llvm import I32
from fiddler.kernels.codegen.variant import KernelVariant

__all__ = ["WeightFormat"]


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
    """The activations that it is multiplied with unless more exact ones are wanted: "bf16" (in pairs) or "f32"."""
    decode: Callable[[ir.IRBuilder, KernelVariant, ir.Value], ir.Value]
    """Generates the code that decodes a vector of stored weights to a vector of float32."""

    def row_bytes(self, columns: int) -> int:
        """Size of a row of `columns` weights [bytes]; raises ValueError where they are no whole blocks."""
        blocks, remainder = divmod(columns, self.block_length)
        if remainder:
            raise ValueError(f"a row of {columns} {self.name} weights is no multiple of {self.block_length}, a block")
        return blocks * self.block_bytes

    @property
    def weight_bytes(self) -> int:
        """Size of one weight [bytes]; raises ValueError where a block has several: none lies by itself."""
        if self.block_length > 1:
            raise ValueError(f"{self.name} stores {self.block_length} weights together")
        return self.block_bytes

    def decode_one(self, b: ir.IRBuilder, variant: KernelVariant, stored: ir.Value) -> ir.Value:
        """Generates the code that decodes one stored weight to float32."""
        vector = self.decode(b, variant, b.bitcast(stored, ir.VectorType(stored.type, 1)))
        return b.extract_element(vector, ir.Constant(I32, 0))
