"""Building blocks of the tiles in LLVM IR: vectors, conversions, loops. Knows no matrices.

Pointers are plain addresses; `b` is the builder that receives the instructions.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba.core import cgutils

__all__ = [
    "F16",
    "F32",
    "I8",
    "I16",
    "I32",
    "I64",
    "address",
    "dot_bf16",
    "horizontal_sum",
    "load",
    "loop",
    "multiply_add",
    "opaque",
    "prefetch",
    "round_to_bf16",
    "splat",
]

F16, F32 = ir.HalfType(), ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def address(b: ir.IRBuilder, base: ir.Value, index: ir.Value, width: int) -> ir.Value:
    """base + index * width bytes, as a pointer."""
    scaled = b.mul(index, ir.Constant(I64, width)) if width != 1 else index
    return b.inttoptr(b.add(base, scaled), I8.as_pointer())


def load(b: ir.IRBuilder, pointer: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    """Load a value of type `kind` from an address that is a multiple of `align` [bytes]."""
    value = b.load(b.bitcast(pointer, kind.as_pointer()))
    value.align = align
    return value


def prefetch(b: ir.IRBuilder, pointer: ir.Value, level: int = 1) -> None:
    """Prefetch a cache line into this level of the cache; an address outside of every mapping is harmless.

    Level 4 is the non-temporal hint (`tuning.NON_TEMPORAL`): into level 1, for data that is used once and should
    displace nothing else.
    """
    byte = I8.as_pointer()
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0"
    )
    b.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 4 - level), ir.Constant(I32, 1)])


def splat(b: ir.IRBuilder, value: ir.Value, count: int) -> ir.Value:
    """A vector with this value in every lane."""
    undefined = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))


def opaque(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same integer, hidden from the optimiser: a load through it is not merged with an earlier load."""
    return b.call(ir.InlineAsm(ir.FunctionType(value.type, [value.type]), "", "=r,0", side_effect=False), [value])


def dot_bf16(b: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    """total + left . right, lane by lane, for 16 lanes of bf16 pairs (`vdpbf16ps`)."""
    floats, pairs = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(floats, [floats, pairs, pairs]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    return b.call(function, [total, left, right])


def multiply_add(b: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    """total + left * right, fused where the CPU can."""
    return b.fadd(total, b.fmul(left, right, flags=("contract",)), flags=("contract",))


def horizontal_sum(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Sum of a vector's lanes, in any order."""
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(F32, [F32, vector.type]), f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    )
    return b.call(function, [ir.Constant(F32, -0.0), vector], fastmath=("reassoc",))


def loop(
    b: ir.IRBuilder,
    name: str,
    begin: ir.Value,
    end: ir.Value,
    step: int,
    carried: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> tuple[ir.Value, list[ir.Value]]:
    """for (k = begin; k < end; k += step) carried = body(k, carried). Returns the final k (>= end) and `carried`."""
    before = b.block
    head, inside, after = (b.append_basic_block(f"{name}.{part}") for part in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(I64)
    k.add_incoming(begin, before)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", k, end), inside, after)
    b.position_at_end(inside)
    results = body(k, list(phis))
    following = b.add(k, ir.Constant(I64, step))
    k.add_incoming(following, b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return k, list(phis)


def round_to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 (or a vector of it) -> nearest bf16's bits, ties to even, in the low half of an i32; NaN stays NaN."""
    count = value.type.count if isinstance(value.type, ir.VectorType) else 0
    word = ir.VectorType(I32, count) if count else I32

    def constant(bits: int) -> ir.Constant:
        return ir.Constant(word, [bits] * count if count else bits)

    bits = b.bitcast(value, word)
    even = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.lshr(b.add(b.add(bits, constant(0x7FFF)), even), constant(16))
    quiet = b.or_(b.lshr(bits, constant(16)), constant(0x40))
    is_nan = b.icmp_unsigned(">", b.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
    return b.select(is_nan, quiet, rounded)
