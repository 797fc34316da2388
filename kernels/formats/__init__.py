"""Weight formats: how each is stored and how a vector of it is decoded. One file a format."""

from typing import Any

from llvmlite import ir
from numba.core import types

from fiddler.kernels.codegen.llvm import I64
from fiddler.kernels.codegen.variant import KernelVariant, compiled
from fiddler.kernels.formats.block_format import BlockFormat
from fiddler.kernels.formats.f32 import F32
from fiddler.kernels.formats.half import BF16, F16
from fiddler.kernels.formats.iq4_nl import IQ4_NL, IQ4_XS
from fiddler.kernels.formats.mxfp4 import MXFP4
from fiddler.kernels.formats.q2_k import Q2_K
from fiddler.kernels.formats.q3_k import Q3_K
from fiddler.kernels.formats.q4_0 import Q4_0, Q4_1
from fiddler.kernels.formats.q4_k import Q4_K
from fiddler.kernels.formats.q5_0 import Q5_0, Q5_1
from fiddler.kernels.formats.q5_k import Q5_K
from fiddler.kernels.formats.q6_k import Q6_K
from fiddler.kernels.formats.q8_0 import Q8_0
from fiddler.kernels.formats.weight_format import PlainFormat, WeightFormat

__all__ = ["BLOCK_FORMATS", "FORMATS", "GPU_FORMATS", "format_of", "plain_format_of", "stored_bytes"]

_PLAIN = BF16, F16, F32
_BLOCKS = Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4
BLOCK_FORMATS: dict[str, BlockFormat] = {each.name: each for each in _BLOCKS}
"""The quantised formats, by their names."""
FORMATS: dict[str, WeightFormat] = {**{each.name: each for each in _PLAIN}, **BLOCK_FORMATS}
"""Every format that the kernels read, by its name."""
GPU_FORMATS = BLOCK_FORMATS.keys() - {"q2_k", "q3_k"}
"""Names of the quantised formats that a GPU decodes, too: those with a decoder in Triton."""


def format_of(variant: KernelVariant) -> WeightFormat:
    """The format of the weights that this variant reads."""
    return FORMATS[variant.weights]


def plain_format_of(variant: KernelVariant) -> PlainFormat:
    """The same, of a variant that reads weights one by one."""
    kind = FORMATS[variant.weights]
    assert isinstance(kind, PlainFormat)
    return kind


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
