"""The formats bf16 and f16 (IEEE 754 binary16): one weight in 16 bits. Knows LLVM IR; no matrices."""

from __future__ import annotations

from llvmlite import ir

from fiddler.kernels.codegen import llvm
from fiddler.kernels.codegen.llvm import F32, I32
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.formats.weight_format import PlainFormat

__all__ = ["BF16", "F16", "halves"]


def _decode_bf16(b: ir.IRBuilder, variant: KernelVariant, bits: ir.Value) -> ir.Value:
    """A vector of bf16 as float32, of which it is the upper half."""
    count = bits.type.count
    wide, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
    return b.bitcast(b.shl(b.zext(bits, wide), ir.Constant(wide, [16] * count)), floats)


def _decode_f16(b: ir.IRBuilder, variant: KernelVariant, bits: ir.Value) -> ir.Value:
    """A vector of binary16 as float32: by the CPU's conversion where it has one."""
    count = bits.type.count
    wide, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(wide, [value] * count)

    if variant.tier.half_convert:
        return b.fpext(b.bitcast(bits, ir.VectorType(llvm.F16, count)), floats)
    # sign, exponent and mantissa are shifted, then scaled by 2**112: exact, subnormals included
    shifted = b.and_(b.shl(b.sext(bits, wide), constant(13)), constant(-0x70002000))
    scaled = b.bitcast(b.fmul(b.bitcast(shifted, floats), ir.Constant(floats, [2.0**112] * count)), wide)
    exponent = constant(0x1F << 23)  # of infinities and NaNs
    special = b.sext(b.icmp_unsigned("==", b.and_(shifted, exponent), exponent), wide)
    return b.bitcast(b.or_(scaled, b.and_(special, constant(0x7F800000))), floats)


BF16 = PlainFormat("bf16", 1, 2, "bf16", _decode_bf16)
F16 = PlainFormat("f16", 1, 2, "f32", _decode_f16)


def halves(b: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """bf16 pairs as two float32 vectors: the low halves and the high halves."""
    count = pairs.type.count
    words, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
    low = b.shl(pairs, ir.Constant(words, [16] * count))
    high = b.and_(pairs, ir.Constant(words, [-(1 << 16)] * count))
    return b.bitcast(low, floats), b.bitcast(high, floats)
