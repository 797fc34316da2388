"""The inner loop for few tokens and quantised weights: dot products block by block. Knows pointers and strides only.

Two tiles. With int8 activations, products of 32 codes and 32 activations are sums of integers, scaled in float32; what
a format's offset or minimum subtracts is a product with the sums of activations. With float32 activations, weights are
decoded in registers.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    address,
    horizontal_sum,
    load,
    loop,
    multiply_add,
    prefetch,
)
from fiddler.kernels.codegen.variant import KernelVariant, compiled, constant_of
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.formats.block_format import GROUP, Block, BlockFormat, picked
from fiddler.kernels.matmul.dot_tiles import LINE
from fiddler.kernels.matmul.read_ahead import read_ahead

__all__ = ["block_tile", "block_tokens"]

_LANES = GROUP // 4  # sums of a group's product of bytes
_CHAINS = 4  # independent sums of a token


def _block_tokens(variant: KernelVariant) -> int:
    if variant.int8_rows:
        return 4 if variant.tier.registers == 32 else 2
    return {32: 4, 16: 3}.get(variant.tier.registers, 2)


block_tokens = constant_of(_block_tokens, types.intp)
"""Maximum tokens of a tile of blocks: more have no registers for their sums and scales."""


@compiled
def block_tile(
    _context: Any,
    variant: Any,
    tokens: Any,
    w: Any,
    row_bytes: Any,
    rows: Any,
    x: Any,
    ldx: Any,
    width: Any,
    c: Any,
    ldc: Any,
    k: Any,
    prefetch_distance: Any,
) -> Any:
    """c[r * ldc + m] += sum over k of w[r] * x[m * ldx + k], for r < rows and m < tokens (1 to `block_tokens`).

    `w`: address of rows of blocks; `x`: activations in the rows layout, `ldx` of its elements apart, for rows of
    `width` weights, of which the first k are multiplied, whole blocks. Prefetches weights that are
    read `prefetch_distance` bytes later.
    """
    kind = variant.variant
    signature = types.void(variant, *([types.intp] * 11))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, tokens, *others = arguments
        none, done = b.append_basic_block("block.none"), b.append_basic_block("block.done")
        switch = b.switch(tokens, none)
        for count in range(1, _block_tokens(kind) + 1):  # a tile for each number of tokens
            case = b.append_basic_block(f"block.{count}")
            switch.add_case(ir.Constant(I64, count), case)
            b.position_at_end(case)
            _generate_rows(b, kind, count, others)
            b.branch(done)
        b.position_at_end(none)
        b.unreachable()
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


def _generate_rows(b: ir.IRBuilder, kind: KernelVariant, tokens: int, arguments: list[ir.Value]) -> None:
    """`block_tile` for this number of tokens: row after row, each a loop over its blocks."""
    w, row_bytes, rows, x, ldx, width, c, ldc, k, prefetch_distance = arguments
    blocks = BLOCK_FORMATS[kind.weights]
    zero = ir.Constant(I64, 0)
    tile = (_Int8Tile if kind.int8_rows else _FloatTile)(b, kind, blocks, tokens, x, ldx, width)
    count = b.sdiv(k, ir.Constant(I64, blocks.block_length))
    unroll = max(1, 128 // blocks.block_length)
    whole = b.and_(count, ir.Constant(I64, -unroll))
    block_bytes = ir.Constant(I64, blocks.block_bytes)
    later = read_ahead(b, prefetch_distance, b.mul(count, block_bytes), row_bytes)

    def one_row(r: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        row = b.add(w, b.mul(r, row_bytes))

        def several(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            at = b.mul(i, block_bytes)
            ahead = b.add(b.add(row, at), later.at(b, at))
            for line in range(0, unroll * blocks.block_bytes, LINE):
                prefetch(b, address(b, ahead, ir.Constant(I64, line), 1), kind.tuning.weights_prefetch_level)
            for u in range(unroll):
                sums = tile.add_block(row, b.add(i, ir.Constant(I64, u)), u, sums)
            return sums

        def one(i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            return tile.add_block(row, i, 0, sums)

        i, sums = loop(b, "whole", zero, whole, unroll, tile.zeros(), several)
        if unroll > 1:
            _, sums = loop(b, "tail", i, count, 1, sums, one)
        for m, total in enumerate(tile.totals(sums)):
            at = b.add(b.mul(r, ldc), ir.Constant(I64, m))
            pointer = b.bitcast(address(b, c, at, 4), F32.as_pointer())
            b.store(b.fadd(b.load(pointer), total), pointer)
        return []

    loop(b, "rows", zero, rows, 1, [], one_row)


class _Tile:
    """Sums of some tokens' products with a row, carried as vectors from block to block."""

    def __init__(
        self,
        b: ir.IRBuilder,
        kind: KernelVariant,
        blocks: BlockFormat,
        tokens: int,
        x: ir.Value,
        ldx: ir.Value,
        width: ir.Value,
    ) -> None:
        self.b, self.kind, self.blocks, self.tokens, self.width = b, kind, blocks, tokens, width
        element = ir.Constant(I64, 1 if kind.int8_rows else 4)
        self.columns = [b.add(x, b.mul(b.mul(ldx, element), ir.Constant(I64, m))) for m in range(tokens)]

    def zeros(self) -> list[ir.Value]:
        """The sums of no block."""
        return [ir.Constant(kind, [0.0] * kind.count) for kind in self._kinds()]

    def block(self, row: ir.Value, i: ir.Value) -> Block:
        """Block i of a row."""
        return Block(self.b, self.kind, self.b.add(row, self.b.mul(i, ir.Constant(I64, self.blocks.block_bytes))))

    def floats(self, base: ir.Value, index: ir.Value, count: int) -> ir.Value:
        """Load float32 from element `index` on."""
        return load(self.b, address(self.b, base, index, 4), ir.VectorType(F32, count), 4)

    def add_block(self, row: ir.Value, i: ir.Value, u: int, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of block i of a row. u: its number in the loop's turn."""
        raise NotImplementedError

    def totals(self, sums: list[ir.Value]) -> list[ir.Value]:
        """Each token's sum, a float32."""
        raise NotImplementedError

    def _kinds(self) -> list[ir.Type]:
        raise NotImplementedError


class _FloatTile(_Tile):
    """Weights decoded to float32, float32 activations."""

    def _kinds(self) -> list[ir.Type]:
        return [ir.VectorType(F32, self.kind.tier.lanes)] * (self.tokens * _CHAINS)

    def add_block(self, row: ir.Value, i: ir.Value, u: int, sums: list[ir.Value]) -> list[ir.Value]:
        b, sums, lanes, block = self.b, list(sums), self.kind.tier.lanes, self.block(row, i)
        scales = self.blocks.scales(block)
        first = b.mul(i, ir.Constant(I64, self.blocks.block_length))
        for group in range(self.blocks.groups):
            for part, weights in enumerate(self.blocks.decode_group(block, scales, group)):
                at = b.add(first, ir.Constant(I64, GROUP * group + lanes * part))
                chain = (u * GROUP // lanes + group * GROUP // lanes + part) % _CHAINS
                for m, column in enumerate(self.columns):
                    n = m * _CHAINS + chain
                    sums[n] = multiply_add(b, sums[n], weights, self.floats(column, at, lanes))
        return sums

    def totals(self, sums: list[ir.Value]) -> list[ir.Value]:
        b = self.b
        return [horizontal_sum(b, reduce(b.fadd, sums[m * _CHAINS : (m + 1) * _CHAINS])) for m in range(self.tokens)]


class _Int8Tile(_Tile):
    """Codes and int8 activations, multiplied as integers.

    sum over a group of scale * (code - offset) * d * q = scale * d * (sum of code * q) - scale * offset * s, with the
    activations' scale d and their sum s = d * (sum of q), which are stored behind the int8 (`int8_activations`).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        blocks, tier = self.blocks, self.kind.tier
        self.lanes = blocks.block_length // blocks.scale_length  # scales of a block
        # without `vpdpbusd`, sums of two products of bytes are int16: codes above 127 must become signed
        self.signed = blocks.largest_code > 127 and not tier.dot_int8 and "avx2" in tier.needs
        self.corrected = bool(blocks.offset) and not self.signed
        self.together = 2 if tier.dot_int8 and tier.lanes == 16 and blocks.groups % 2 == 0 else 1  # groups of a product
        b = self.b
        sixteenth = b.udiv(self.width, ir.Constant(I64, 16))
        self.scales_at = [b.add(column, self.width) for column in self.columns]
        further = b.mul(sixteenth, ir.Constant(I64, 2))  # bytes of K / 32 float32
        sums_at = further if blocks.scale_length == GROUP else b.mul(further, ir.Constant(I64, 2))
        self.sums_at = [b.add(at, sums_at) for at in self.scales_at]

    def _kinds(self) -> list[ir.Type]:
        products = [ir.VectorType(F32, self.together * _LANES)] * (self.tokens * _CHAINS)
        return products + [ir.VectorType(F32, self.lanes)] * self.tokens

    def add_block(self, row: ir.Value, i: ir.Value, u: int, sums: list[ir.Value]) -> list[ir.Value]:
        b, sums, block, groups = self.b, list(sums), self.block(row, i), self.blocks.groups
        scales = self.blocks.scales(block)
        first = b.mul(i, ir.Constant(I64, groups))
        subtracted = scales.minimum if scales.minimum is not None else scales.scale if self.corrected else None
        scaled = []
        for m in range(self.tokens):
            d = picked(
                b,
                self.floats(self.scales_at[m], first, groups),
                [lane * groups // self.lanes for lane in range(self.lanes)],
            )
            scaled.append(b.fmul(scales.scale, d))
            if subtracted is not None:
                at, n = b.mul(i, ir.Constant(I64, self.lanes)), self.tokens * _CHAINS + m
                sums[n] = multiply_add(b, sums[n], subtracted, self.floats(self.sums_at[m], at, self.lanes))
        start, together = b.mul(i, ir.Constant(I64, self.blocks.block_length)), self.together
        for group in range(0, groups, together):
            codes = self.blocks.codes(block, group) if together == 1 else self.blocks.pair(block, group // 2)
            lanes = [self.blocks.lanes_of(group, 4, lane) for lane in range(together * _LANES)]
            chain = (u * groups + group) // together % _CHAINS
            for m, column in enumerate(self.columns):
                pointer = address(b, column, b.add(start, ir.Constant(I64, GROUP * group)), 1)
                dot = self._dot(codes, load(b, pointer, ir.VectorType(I8, together * GROUP), 1))
                n = m * _CHAINS + chain
                product = b.sitofp(dot, ir.VectorType(F32, together * _LANES))
                sums[n] = multiply_add(b, sums[n], product, picked(b, scaled[m], lanes))
        return sums

    def totals(self, sums: list[ir.Value]) -> list[ir.Value]:
        b, result = self.b, []
        for m in range(self.tokens):
            total = horizontal_sum(b, reduce(b.fadd, sums[m * _CHAINS : (m + 1) * _CHAINS]))
            if self.corrected or not self.blocks.offset:
                further = sums[self.tokens * _CHAINS + m]
                subtracted = (
                    horizontal_sum(b, further) if self.lanes > 1 else b.extract_element(further, ir.Constant(I32, 0))
                )
                if self.blocks.offset:
                    subtracted = b.fmul(subtracted, ir.Constant(F32, float(self.blocks.offset)))
                total = b.fsub(total, subtracted)
            result.append(total)
        return result

    def _dot(self, codes: ir.Value, x: ir.Value) -> ir.Value:
        """Sums of four neighbours of codes * x: int32 [8], or [16]."""
        b, tier = self.b, self.kind.tier
        words = ir.VectorType(I32, self.together * _LANES)
        if tier.dot_int8:
            function, name = ir.FunctionType(words, [words] * 3), f"llvm.x86.avx512.vpdpbusd.{words.count * 32}"
            dot = cgutils.get_or_insert_function(b.module, function, name)
            return b.call(dot, [ir.Constant(words, [0] * words.count), b.bitcast(codes, words), b.bitcast(x, words)])
        if "avx2" in tier.needs:
            return self._dot_avx2(codes, x)
        wide = ir.VectorType(I32, GROUP)
        products = b.mul(b.zext(codes, wide), b.sext(x, wide))
        for _ in range(2):
            count = products.type.count
            products = b.add(picked(b, products, range(0, count, 2)), picked(b, products, range(1, count, 2)))
        return products

    def _dot_avx2(self, codes: ir.Value, x: ir.Value) -> ir.Value:
        b, kind, halves = self.b, codes.type, ir.VectorType(I16, GROUP // 2)
        words = ir.VectorType(I32, _LANES)

        def call(name: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
            function = ir.FunctionType(result, [operand.type for operand in operands])
            return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.x86.avx2.{name}"), operands)

        if self.signed:
            offset = self.blocks.offset
            values = b.sub(codes, ir.Constant(kind, [offset - (256 if offset > 127 else 0)] * GROUP))
            zero = ir.Constant(kind, [0] * GROUP)
            x = call("psign.b", kind, x, values)
            codes = b.select(b.icmp_signed("<", values, zero), b.sub(zero, values), values)
        pairs = call("pmadd.ub.sw", halves, codes, x)
        return call("pmadd.wd", words, pairs, ir.Constant(halves, [1] * (GROUP // 2)))
