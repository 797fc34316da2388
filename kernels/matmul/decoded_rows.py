"""Decodes rows of quantised weights to memory: to float32, or to bf16 for tiles of pairs. Knows addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import I16, I64, address, loop, prefetch
from fiddler.kernels.codegen.variant import KernelVariant, compiled
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.formats.block_format import GROUP, Block
from fiddler.kernels.matmul.dot_tiles import LINE

__all__ = ["decode_row"]


@compiled
def decode_row(_context: Any, variant: Any, w: Any, out: Any, k: Any, prefetch_distance: Any) -> Any:
    """Decode k weights, whole blocks, from the address `w` to the address `out`.

    To bf16, rounded to nearest, where the variant multiplies bf16 pairs; else to float32. Prefetches the weights
    `prefetch_distance` bytes further.
    """
    kind: KernelVariant = variant.variant
    blocks = BLOCK_FORMATS[kind.weights]
    width = 2 if kind.bf16_pairs else 4

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, w, out, k, prefetch_distance = arguments

        def one(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            base = b.add(w, b.mul(i, ir.Constant(I64, blocks.block_bytes)))
            block, first = Block(b, kind, base), b.mul(i, ir.Constant(I64, blocks.block_length))
            for line in range(0, max(LINE, blocks.block_bytes), LINE):
                ahead = b.add(b.add(base, prefetch_distance), ir.Constant(I64, line))
                prefetch(b, address(b, ahead, ir.Constant(I64, 0), 1), kind.tuning.weights_prefetch_level)
            scales = blocks.scales(block)
            for group in range(blocks.groups):
                at = b.add(first, ir.Constant(I64, GROUP * group))
                vectors = blocks.decode_group(block, scales, group)
                _store(b, kind, vectors, address(b, out, at, width))
            return []

        count = b.sdiv(k, ir.Constant(I64, blocks.block_length))
        loop(b, "blocks", ir.Constant(I64, 0), count, 1, [], one)
        return context.get_dummy_value()

    return types.void(variant, *([types.intp] * 4)), generate


def _store(b: ir.IRBuilder, kind: KernelVariant, vectors: list[ir.Value], pointer: ir.Value) -> None:
    """A group's weights to memory."""
    if kind.bf16_pairs:
        floats, halves = vectors[0].type, ir.VectorType(I16, GROUP)
        function = ir.FunctionType(halves, [floats, floats])
        narrow = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx512bf16.cvtne2ps2bf16.512")
        b.store(b.call(narrow, vectors[::-1]), b.bitcast(pointer, halves.as_pointer())).align = 2
        return
    for part, vector in enumerate(vectors):
        target = b.gep(b.bitcast(pointer, vector.type.as_pointer()), [ir.Constant(I64, part)])
        b.store(vector, target).align = 4
