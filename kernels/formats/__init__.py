"""Weight formats: how each is stored and how a vector of it is decoded. One file a format."""

from typing import Any

from llvmlite import ir
from numba.core import types

from fiddler.kernels.codegen.llvm import I64
from fiddler.kernels.codegen.variant import KernelVariant, compiled
from fiddler.kernels.formats.half import BF16, F16
from fiddler.kernels.formats.weight_format import WeightFormat

__all__ = ["FORMATS", "format_of", "stored_bytes"]

FORMATS: dict[str, WeightFormat] = {each.name: each for each in (BF16, F16)}
"""Every format that the kernels read, by its name."""


def format_of(variant: KernelVariant) -> WeightFormat:
    """The format of the weights that this variant reads."""
    return FORMATS[variant.weights]


@compiled
def stored_bytes(_context: Any, variant: Any, weights: Any) -> Any:
    """For compiled code: `WeightFormat.row_bytes` of so many weights, which must be whole blocks."""
    kind = format_of(variant.variant)

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        blocks = arguments[1]
        if kind.block_length > 1:
            blocks = b.sdiv(blocks, ir.Constant(I64, kind.block_length))
        return b.mul(ir.Constant(I64, kind.block_bytes), blocks, flags=("nsw",))

    return types.intp(variant, types.intp), generate
