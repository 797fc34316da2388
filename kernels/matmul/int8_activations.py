"""Activations as int8 with scales, for products with quantised weights: how a token's row lies in memory.

A row of K activations is K int8, then float32: K / 32 scales, one for each 32 neighbours; K / 32 sums, of each 32
neighbours; K / 16 sums, of each 16. Sums are those of the rounded activations, times the scale. K is a multiple of 32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import F32, I8, I32, I64, address, load
from fiddler.kernels.codegen.variant import compiled

__all__ = ["int8_row_bytes", "store_int8", "store_int8_column"]


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


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, function, name), arguments)


def _store(b: ir.IRBuilder, row: ir.Value, width: ir.Value, index: ir.Value, values: ir.Value) -> None:
    """Largest magnitude / 127 is the scale. Among bits of magnitudes, infinities and NaN are largest."""
    words = ir.VectorType(I32, 32)
    magnitudes = b.and_(b.bitcast(values, words), ir.Constant(words, [0x7FFFFFFF] * 32))
    largest = b.bitcast(_call(b, "llvm.vector.reduce.umax.v32i32", I32, magnitudes), F32)
    scale = b.fdiv(largest, ir.Constant(F32, 127.0))
    is_zero = b.fcmp_ordered("==", largest, ir.Constant(F32, 0.0))
    inverse = b.select(is_zero, ir.Constant(F32, 0.0), b.fdiv(ir.Constant(F32, 127.0), largest))
    undefined = ir.Constant(values.type, ir.Undefined)
    repeated = b.shuffle_vector(
        b.insert_element(undefined, inverse, ir.Constant(I32, 0)), undefined, ir.Constant(words, [0] * 32)
    )
    rounded = _call(b, "llvm.rint.v32f32", values.type, b.fmul(values, repeated))
    integers = _call(b, "llvm.fptosi.sat.v32i32.v32f32", words, rounded)
    codes = b.trunc(integers, ir.VectorType(I8, 32))
    pointer = address(b, row, index, 1)
    b.store(codes, b.bitcast(pointer, codes.type.as_pointer())).align = 1
    half = ir.VectorType(I32, 16)
    sums = []
    for begin in (0, 16):
        part = b.shuffle_vector(
            integers, ir.Constant(words, ir.Undefined), ir.Constant(half, list(range(begin, begin + 16)))
        )
        total = _call(b, "llvm.vector.reduce.add.v16i32", I32, part)
        sums.append(b.fmul(scale, b.sitofp(total, F32)))
    group, scales_at = b.udiv(index, ir.Constant(I64, 32)), b.add(row, width)
    eighth = b.udiv(width, ir.Constant(I64, 8))
    sums_at = b.add(scales_at, eighth)
    halves_at = b.add(sums_at, eighth)
    first_half = b.mul(group, ir.Constant(I64, 2))
    second_half = b.add(first_half, ir.Constant(I64, 1))
    targets = (scales_at, group, scale), (sums_at, group, b.fadd(*sums))
    for base, at, value in (*targets, (halves_at, first_half, sums[0]), (halves_at, second_half, sums[1])):
        b.store(value, b.bitcast(address(b, base, at, 4), F32.as_pointer())).align = 4
