"""Activations as int8 with scales, for products with quantised weights: how they lie in memory, in rows and packed.

32 neighbours, a group, share a scale: their largest magnitude / 127. K is a multiple of 32.
*In rows*, a token's K activations are K int8, then float32: K / 32 scales; K / 32 sums, of each 32 neighbours; K / 16
sums, of each 16. Sums are those of the rounded activations, times the scale.
*Packed*, a panel of tokens is words [K / 32, `GROUP_WORDS`, tokens]: of each group 8 words of 4 elements, unsigned, the
int8 plus 128; the scale, float32; the sums of the first and of the last 16 int8, float32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import F32, I8, I32, I64, address, load, splat
from fiddler.kernels.codegen.variant import compiled

__all__ = [
    "GROUP_WORDS",
    "int8_row_bytes",
    "store_int8",
    "store_int8_column",
    "store_int8_columns_packed",
    "store_int8_packed",
]

GROUP_WORDS = 11
"""Words of 4 bytes of a group of 32 activations of a packed token."""

_TOKENS = 16  # lanes of a vector of packed tokens


@compiled
def int8_row_bytes(_context: Any, width: Any) -> Any:
    """Size of a token's row of `width` activations [bytes]."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.udiv(b.mul(arguments[0], ir.Constant(I64, 3)), ir.Constant(I64, 2))

    return types.intp(types.intp), generate


@compiled
def store_int8(_context: Any, row: Any, width: Any, index: Any, source: Any) -> Any:
    """Round the 32 float32 at the address `source` to elements `index` to `index` + 31 of the row at `row`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        row, width, index, source = arguments
        values = load(b, address(b, source, ir.Constant(I64, 0), 1), ir.VectorType(F32, 32), 4)
        _store(b, row, width, index, values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@compiled
def store_int8_column(_context: Any, row: Any, width: Any, index: Any, source: Any, stride: Any) -> Any:
    """`store_int8` of 32 float32 that lie `stride` bytes apart."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        row, width, index, source, stride = arguments
        values = ir.Constant(ir.VectorType(F32, 32), ir.Undefined)
        for lane in range(32):
            value = load(b, address(b, source, b.mul(stride, ir.Constant(I64, lane)), 1), F32, 4)
            values = b.insert_element(values, value, ir.Constant(I32, lane))
        _store(b, row, width, index, values)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@compiled
def store_int8_packed(_context: Any, group: Any, wide: Any, source: Any) -> Any:
    """Round the 32 float32 at the address `source` to a token's group at `group`, in a panel of `wide` tokens."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        group, wide, source = arguments
        values = load(b, address(b, source, ir.Constant(I64, 0), 1), ir.VectorType(F32, 32), 4)
        integers, scale = _rounded(b, values)
        codes = b.trunc(integers, ir.VectorType(I8, 32))
        words = b.bitcast(b.xor(codes, ir.Constant(codes.type, [-128] * 32)), ir.VectorType(I32, 8))
        parts = [b.extract_element(words, ir.Constant(I32, p)) for p in range(8)]
        _store_group(b, group, wide, [*parts, scale, *_half_sums(b, integers)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@compiled
def store_int8_columns_packed(_context: Any, group: Any, wide: Any, source: Any, stride: Any) -> Any:
    """`store_int8_packed` of 16 tokens at once, whose activations lie `stride` bytes apart, beside each other."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        group, wide, source, stride = arguments
        floats, words = ir.VectorType(F32, _TOKENS), ir.VectorType(I32, _TOKENS)
        rows = [load(b, address(b, source, b.mul(stride, ir.Constant(I64, i)), 1), floats, 4) for i in range(32)]
        largest = ir.Constant(words, [0] * _TOKENS)
        for values in rows:
            magnitudes = _magnitudes(b, values)
            largest = b.select(b.icmp_unsigned(">", magnitudes, largest), magnitudes, largest)
        scale, inverse = _scale_of(b, b.bitcast(largest, floats))
        integers = [_integers(b, values, inverse) for values in rows]
        parts, sums = [], []
        for p in range(8):
            word = ir.Constant(words, [0] * _TOKENS)
            for byte in range(4):
                unsigned = b.add(integers[4 * p + byte], ir.Constant(words, [128] * _TOKENS))
                word = b.or_(word, b.shl(unsigned, ir.Constant(words, [8 * byte] * _TOKENS)))
            parts.append(word)
        for begin in (0, 16):
            total = integers[begin]
            for each in integers[begin + 1 : begin + 16]:
                total = b.add(total, each)
            sums.append(b.sitofp(total, floats))
        _store_group(b, group, wide, [*parts, scale, *sums])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


def _store_group(b: ir.IRBuilder, group: ir.Value, wide: ir.Value, parts: list[ir.Value]) -> None:
    """Write the words of a group, of one token or of neighbours."""
    for p, part in enumerate(parts):
        pointer = address(b, group, b.mul(wide, ir.Constant(I64, p)), 4)
        b.store(part, b.bitcast(pointer, part.type.as_pointer())).align = 4


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), arguments)


def _magnitudes(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """Bits of magnitudes, as integers: among these, infinities and NaN are largest."""
    words = ir.VectorType(I32, values.type.count)
    return b.and_(b.bitcast(values, words), ir.Constant(words, [0x7FFFFFFF] * words.count))


def _scale_of(b: ir.IRBuilder, largest: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The scale of a largest magnitude, and its inverse; or of each lane."""

    def constant(value: float) -> ir.Constant:
        return ir.Constant(
            largest.type, [value] * largest.type.count if isinstance(largest.type, ir.VectorType) else value
        )

    is_zero = b.fcmp_ordered("==", largest, constant(0.0))
    inverse = b.select(is_zero, constant(0.0), b.fdiv(constant(127.0), largest))
    return b.fdiv(largest, constant(127.0)), inverse


def _integers(b: ir.IRBuilder, values: ir.Value, inverse: ir.Value) -> ir.Value:
    """Values times an inverse, rounded to int32; NaN becomes 0."""
    count = values.type.count
    rounded = _call(b, f"llvm.rint.v{count}f32", values.type, b.fmul(values, inverse))
    return _call(b, f"llvm.fptosi.sat.v{count}i32.v{count}f32", ir.VectorType(I32, count), rounded)


def _rounded(b: ir.IRBuilder, values: ir.Value) -> tuple[ir.Value, ir.Value]:
    """32 values of a group as int32, and their scale."""
    largest = b.bitcast(_call(b, "llvm.vector.reduce.umax.v32i32", I32, _magnitudes(b, values)), F32)
    scale, inverse = _scale_of(b, largest)
    return _integers(b, values, splat(b, inverse, 32)), scale


def _half_sums(b: ir.IRBuilder, integers: ir.Value) -> list[ir.Value]:
    """The sums of the first and of the last 16 of 32 integers, as float32."""
    half, sums = ir.VectorType(I32, 16), []
    for begin in (0, 16):
        index = ir.Constant(half, list(range(begin, begin + 16)))
        part = b.shuffle_vector(integers, ir.Constant(integers.type, ir.Undefined), index)
        sums.append(b.sitofp(_call(b, "llvm.vector.reduce.add.v16i32", I32, part), F32))
    return sums


def _store(b: ir.IRBuilder, row: ir.Value, width: ir.Value, index: ir.Value, values: ir.Value) -> None:
    """A group in rows."""
    integers, scale = _rounded(b, values)
    codes = b.trunc(integers, ir.VectorType(I8, 32))
    pointer = address(b, row, index, 1)
    b.store(codes, b.bitcast(pointer, codes.type.as_pointer())).align = 1
    sums = [b.fmul(scale, total) for total in _half_sums(b, integers)]
    group, scales_at = b.udiv(index, ir.Constant(I64, 32)), b.add(row, width)
    eighth = b.udiv(width, ir.Constant(I64, 8))
    sums_at = b.add(scales_at, eighth)
    halves_at = b.add(sums_at, eighth)
    first_half = b.mul(group, ir.Constant(I64, 2))
    second_half = b.add(first_half, ir.Constant(I64, 1))
    targets = (scales_at, group, scale), (sums_at, group, b.fadd(*sums))
    for base, at, value in (*targets, (halves_at, first_half, sums[0]), (halves_at, second_half, sums[1])):
        b.store(value, b.bitcast(address(b, base, at, 4), F32.as_pointer())).align = 4
