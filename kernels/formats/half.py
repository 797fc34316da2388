"""bf16 and binary16 weights: decodes vectors of them to float32. Knows LLVM IR; no matrices."""

from __future__ import annotations

from llvmlite import ir

from fiddler.kernels.codegen.llvm import F16, F32, I16, I32
from fiddler.kernels.codegen.variant import KernelVariant

__all__ = ["halves", "widen", "widen_one"]


def widen(b: ir.IRBuilder, variant: KernelVariant, bits: ir.Value) -> ir.Value:
    """A vector of 16-bit weights as float32."""
    count = bits.type.count
    wide, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(wide, [value] * count)

    if variant.weights == "bf16":
        return b.bitcast(b.shl(b.zext(bits, wide), constant(16)), floats)
    if variant.tier.half_convert:
        return b.fpext(b.bitcast(bits, ir.VectorType(F16, count)), floats)
    # sign, exponent and mantissa are shifted, then scaled by 2**112: exact, subnormals included
    shifted = b.and_(b.shl(b.sext(bits, wide), constant(13)), constant(-0x70002000))
    scaled = b.bitcast(b.fmul(b.bitcast(shifted, floats), ir.Constant(floats, [2.0**112] * count)), wide)
    exponent = constant(0x1F << 23)  # of infinities and NaNs
    special = b.sext(b.icmp_unsigned("==", b.and_(shifted, exponent), exponent), wide)
    return b.bitcast(b.or_(scaled, b.and_(special, constant(0x7F800000))), floats)


def widen_one(b: ir.IRBuilder, variant: KernelVariant, bits: ir.Value) -> ir.Value:
    """One 16-bit weight as float32."""
    return b.extract_element(widen(b, variant, b.bitcast(bits, ir.VectorType(I16, 1))), ir.Constant(I32, 0))


def halves(b: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    """bf16 pairs as two float32 vectors: the low halves and the high halves."""
    count = pairs.type.count
    words, floats = ir.VectorType(I32, count), ir.VectorType(F32, count)
    low = b.shl(pairs, ir.Constant(words, [16] * count))
    high = b.and_(pairs, ir.Constant(words, [-(1 << 16)] * count))
    return b.bitcast(low, floats), b.bitcast(high, floats)
