"""Writes activations, sums and words to addresses, in the types that the tiles read, and reads floats.

Knows nothing of layouts.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import F32, I8, I16, I32, I64, address, load, round_to_bf16
from fiddler.kernels.codegen.variant import KernelVariant, compiled

__all__ = ["copy_words", "load_float", "store_activation", "store_float", "store_pair", "store_pairs", "store_word"]


@compiled
def store_activation(_context: Any, variant: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`, in the variant's type for the rows layout."""
    kind = variant.variant

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, base, index, value = arguments
        if kind.bf16_rows:
            bits = b.trunc(round_to_bf16(b, value), I16)
            b.store(bits, b.bitcast(address(b, base, index, 2), I16.as_pointer()))
        else:
            _store_rounded(b, kind, base, index, value)
        return context.get_dummy_value()

    return types.void(variant, types.intp, types.intp, types.float32), generate


@compiled
def store_word(_context: Any, variant: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as word `index` from the address `base`, in the variant's type for unpaired packed words."""
    kind = variant.variant

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, base, index, value = arguments
        _store_rounded(b, kind, base, index, value)
        return context.get_dummy_value()

    return types.void(variant, types.intp, types.intp, types.float32), generate


def _store_rounded(b: ir.IRBuilder, variant: KernelVariant, base: ir.Value, index: ir.Value, value: ir.Value) -> None:
    """Write a float32, rounded to bf16 if the variant rounds activations."""
    if variant.activations == "bf16":
        value = b.bitcast(b.shl(round_to_bf16(b, value), ir.Constant(I32, 16)), F32)
    b.store(value, b.bitcast(address(b, base, index, 4), F32.as_pointer()))


@compiled
def store_float(_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, value = arguments
        b.store(value, b.bitcast(address(b, base, index, 4), F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@compiled
def load_float(_context: Any, base: Any, index: Any) -> Any:
    """The float32 that is element `index` from the address `base`."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index = arguments
        return load(b, address(b, base, index, 4), F32, 4)

    return types.float32(types.intp, types.intp), generate


@compiled
def store_pair(_context: Any, base: Any, index: Any, low: Any, high: Any) -> Any:
    """Write two float32 as one word of bf16 bits, `low` in the low half, at word `index` from the address `base`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, low, high = arguments
        word = b.or_(round_to_bf16(b, low), b.shl(round_to_bf16(b, high), ir.Constant(I32, 16)))
        b.store(word, b.bitcast(address(b, base, index, 4), I32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.float32), generate


@compiled
def store_pairs(_context: Any, base: Any, index: Any, low: Any, high: Any) -> Any:
    """`store_pair` for 16 neighbours: words from `index` on, from the float32 at the addresses `low` and `high`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, low, high = arguments
        floats, words = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
        lows, highs = (
            round_to_bf16(b, load(b, address(b, start, ir.Constant(I64, 0), 1), floats, 4)) for start in (low, high)
        )
        both = b.or_(lows, b.shl(highs, ir.Constant(words, [16] * 16)))
        b.store(both, b.bitcast(address(b, base, index, 4), words.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@compiled
def copy_words(_context: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy `count` words of 4 bytes between addresses."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        target, source, count = arguments
        cgutils.raw_memcpy(b, b.inttoptr(target, I8.as_pointer()), b.inttoptr(source, I8.as_pointer()), count, 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate
