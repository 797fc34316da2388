"""Table lookup of codes of 4 bits in LLVM IR, and the nearest entry of such a table. Knows no formats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.llvm import I8, I32
from fiddler.kernels.formats.block_format import Block

__all__ = ["looked_up", "nearest_entry"]


def looked_up(block: Block, index: ir.Value, table: Sequence[int]) -> ir.Value:
    """The entries, unsigned bytes, at 32 positions from 0 to 15: one shuffle of bytes where the CPU has AVX2."""
    b, entries = block.b, [entry - (256 if entry > 127 else 0) for entry in table]
    if "avx2" in block.variant.tier.needs:
        kind = ir.VectorType(I8, 32)
        shuffle = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind, kind]), "llvm.x86.avx2.pshuf.b")
        return b.call(shuffle, [ir.Constant(kind, entries * 2), index])
    memory = ir.Constant(ir.ArrayType(I8, 16), entries)
    pointer, zero = cgutils.global_constant(b.module, "lookup_table", memory), ir.Constant(I32, 0)
    result = ir.Constant(index.type, ir.Undefined)
    for lane in range(index.type.count):
        at = ir.Constant(I32, lane)
        position = b.zext(b.extract_element(index, at), I32)
        result = b.insert_element(result, b.load(b.gep(pointer, [zero, position])), at)
    return result


@njit(**OPTIONS)
def nearest_entry(table: np.ndarray, value: np.float32) -> int:
    """The position of the nearest entry of an ascending table; of two as near, the upper one."""
    if not value > table[0]:
        return 0
    if value >= table[-1]:
        return table.size - 1
    position = 1
    while table[position] <= value:
        position += 1
    return position - 1 if value - table[position - 1] < table[position] - value else position
