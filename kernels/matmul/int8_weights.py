"""Rows of quantised weights as int8 with scales, for products with many int8 activations: how they lie in memory.

A row of `decoded_k` weights, K: K int8, each a code less the format's offset; then K / 16 int32, K / 16 float32, and
again: for each `scale_length` neighbours -128 times the sum of their int8, the scale, and the minimum, negative; where a
scale is of 32, or there are no minimums, the rest stays unused. Knows addresses.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import I8, I32, I64, address, loop, prefetch
from fiddler.kernels.codegen.variant import KernelVariant, compiled, constant_of
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.formats.block_format import GROUP, Block, BlockFormat, picked
from fiddler.kernels.matmul.dot_tiles import LINE

__all__ = ["PER_SCALE", "int8_row_words", "stride_of", "unpack_row"]

PER_SCALE = 3
"""Words of 4 bytes beside the int8 of a scale: the start of a sum, the scale, the minimum."""


def stride_of(variant: KernelVariant) -> int:
    """Words of 4 bytes from one row to the next: a cache line more than a row, so that rows spread over the cache."""
    weights = variant.tuning.decoded_k
    return weights // 4 + PER_SCALE * weights // 16 + LINE // 4


int8_row_words = constant_of(stride_of, types.intp)
"""`stride_of` in compiled code."""


@compiled
def unpack_row(_context: Any, variant: Any, w: Any, out: Any, k: Any, prefetch_distance: Any) -> Any:
    """Write k weights, whole blocks and at most `decoded_k`, from the address `w` as a row at the address `out`.

    Prefetches the weights `prefetch_distance` bytes further.
    """
    kind: KernelVariant = variant.variant
    blocks = BLOCK_FORMATS[kind.weights]

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, w, out, k, prefetch_distance = arguments

        def one(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            base = b.add(w, b.mul(i, ir.Constant(I64, blocks.block_bytes)))
            for line in range(0, max(LINE, blocks.block_bytes), LINE):
                ahead = b.add(b.add(base, prefetch_distance), ir.Constant(I64, line))
                prefetch(b, address(b, ahead, ir.Constant(I64, 0), 1), kind.tuning.weights_prefetch_level)
            _unpack_block(b, kind, blocks, Block(b, kind, base), i, out)
            return []

        count = b.sdiv(k, ir.Constant(I64, blocks.block_length))
        loop(b, "blocks", ir.Constant(I64, 0), count, 1, [], one)
        return context.get_dummy_value()

    return types.void(variant, *([types.intp] * 4)), generate


def _unpack_block(
    b: ir.IRBuilder, kind: KernelVariant, blocks: BlockFormat, block: Block, i: ir.Value, out: ir.Value
) -> None:
    """Write block i of a row."""
    weights, scales = kind.tuning.decoded_k, blocks.scales(block)
    first, sums = b.mul(i, ir.Constant(I64, blocks.block_length)), []
    for group in range(blocks.groups):
        codes = blocks.codes(block, group)
        if blocks.offset:
            codes = b.sub(codes, block.constant(blocks.offset - (256 if blocks.offset > 127 else 0), codes))
        _store(b, codes, address(b, out, b.add(first, ir.Constant(I64, GROUP * group)), 1))
        sums.append(_dot_128(b, codes))
    count = blocks.block_length // blocks.scale_length
    total = _joined(b, sums)
    while total.type.count > count:
        size = total.type.count
        total = b.add(picked(b, total, range(0, size, 2)), picked(b, total, range(1, size, 2)))
    at, size = b.add(out, ir.Constant(I64, weights)), ir.Constant(I64, weights // 16 * 4)
    start = b.sub(ir.Constant(total.type, [0] * count), total)
    parts = [start, scales.scale]
    assert blocks.has_minimum == (scales.minimum is not None)
    if scales.minimum is not None:
        parts.append(b.fneg(scales.minimum))
    for part in parts:
        _store(b, part, address(b, at, b.mul(i, ir.Constant(I64, count)), 4))
        at = b.add(at, size)


def _store(b: ir.IRBuilder, vector: ir.Value, pointer: ir.Value) -> None:
    b.store(vector, b.bitcast(pointer, vector.type.as_pointer())).align = 1


def _dot_128(b: ir.IRBuilder, values: ir.Value) -> ir.Value:
    """128 times the sums of four neighbours of 32 int8: int32 [8]."""
    words = ir.VectorType(I32, GROUP // 4)
    function = ir.FunctionType(words, [words] * 3)
    dot = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx512.vpdpbusd.256")
    unsigned = b.bitcast(ir.Constant(ir.VectorType(I8, GROUP), [-128] * GROUP), words)  # bytes of 128
    return b.call(dot, [ir.Constant(words, [0] * words.count), unsigned, b.bitcast(values, words)])


def _joined(b: ir.IRBuilder, vectors: list[ir.Value]) -> ir.Value:
    """Vectors, a power of two of them, as one."""
    while len(vectors) > 1:
        index = ir.Constant(ir.VectorType(I32, 2 * vectors[0].type.count), list(range(2 * vectors[0].type.count)))
        vectors = [b.shuffle_vector(*pair, index) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]
