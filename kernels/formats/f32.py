"""The format f32: a weight is a float32. Knows LLVM IR; no matrices."""

from __future__ import annotations

from llvmlite import ir

from fiddler.kernels.codegen.llvm import F32 as FLOAT
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.formats.weight_format import PlainFormat

__all__ = ["F32"]


def _decode(b: ir.IRBuilder, _variant: KernelVariant, bits: ir.Value) -> ir.Value:
    return b.bitcast(bits, ir.VectorType(FLOAT, bits.type.count))


F32 = PlainFormat("f32", 1, 4, "f32", _decode)
