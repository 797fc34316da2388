"""Rows of quantised weights as int8 with scales, for products with many int8 activations: how they lie in memory.

A row of `decoded_k` weights, K: K int8, each a code less the format's offset; then K / 16 int32, K / 16 float32, and
again: for each `scale_length` neighbours -128 times the sum of their int8, the scale, and the minimum, negative. Where
scales are of 32, or there are no minimums, the rest stays unused. Knows addresses.
"""

from __future__ import annotations

from collections.abc import Callable
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

_TOGETHER = 256  # weights whose sums are added together


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

        unroll = max(1, _TOGETHER // blocks.block_length)

        def blocks_from(count: int) -> Callable[[ir.Value, list[ir.Value]], list[ir.Value]]:
            def unpack(i: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
                base = b.add(w, b.mul(i, ir.Constant(I64, blocks.block_bytes)))
                for line in range(0, max(LINE, count * blocks.block_bytes), LINE):
                    ahead = b.add(b.add(base, prefetch_distance), ir.Constant(I64, line))
                    prefetch(b, address(b, ahead, ir.Constant(I64, 0), 1), kind.tuning.weights_prefetch_level)
                _unpack_blocks(b, kind, blocks, count, base, i, out)
                return []

            return unpack

        count = b.sdiv(k, ir.Constant(I64, blocks.block_length))
        whole = b.and_(count, ir.Constant(I64, -unroll))
        i, _ = loop(b, "several", ir.Constant(I64, 0), whole, unroll, [], blocks_from(unroll))
        if unroll > 1:
            loop(b, "blocks", i, count, 1, [], blocks_from(1))
        return context.get_dummy_value()

    return types.void(variant, *([types.intp] * 4)), generate


def _unpack_blocks(
    b: ir.IRBuilder, kind: KernelVariant, blocks: BlockFormat, count: int, base: ir.Value, i: ir.Value, out: ir.Value
) -> None:
    """Write `count` blocks from the address `base` as blocks i, i + 1 ... of a row."""
    weights, sums = kind.tuning.decoded_k, []
    per_block = blocks.block_length // blocks.scale_length
    starts, scales, minimums = (
        b.add(
            b.add(out, ir.Constant(I64, weights + weights // 16 * 4 * part)), b.mul(i, ir.Constant(I64, 4 * per_block))
        )
        for part in range(PER_SCALE)
    )
    for n in range(count):
        block = Block(b, kind, b.add(base, ir.Constant(I64, n * blocks.block_bytes)))
        first = b.add(b.mul(i, ir.Constant(I64, blocks.block_length)), ir.Constant(I64, n * blocks.block_length))
        for group in range(blocks.groups):
            codes = blocks.codes(block, group)
            if blocks.offset:
                codes = b.sub(codes, block.constant(blocks.offset - (256 if blocks.offset > 127 else 0), codes))
            _store(b, codes, address(b, out, b.add(first, ir.Constant(I64, GROUP * group)), 1))
            sums.append(_dot_128(b, codes))
        found = blocks.scales(block)
        _store(b, found.scale, address(b, scales, ir.Constant(I64, n * per_block), 4))
        assert blocks.has_minimum == (found.minimum is not None)
        if found.minimum is not None:
            _store(b, b.fneg(found.minimum), address(b, minimums, ir.Constant(I64, n * per_block), 4))
    total = _joined(b, sums)
    while total.type.count > count * per_block:
        size = total.type.count
        total = b.add(picked(b, total, range(0, size, 2)), picked(b, total, range(1, size, 2)))
    start = b.sub(ir.Constant(total.type, [0] * total.type.count), total)
    _store(b, start, address(b, starts, ir.Constant(I64, 0), 1))


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
