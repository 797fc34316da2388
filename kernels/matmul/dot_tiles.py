"""The inner loop for few tokens: dot products of weight rows in vector registers. Knows pointers and strides only.

It suits numbers of tokens for which the memory limits the speed; `outer_tiles` has the loop for many tokens. A tile is
generated for its `KernelVariant`: the types of weights and activations and the instructions that multiply them.
Pointers are plain addresses.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types

from fiddler.kernels.codegen.llvm import (
    F32,
    I16,
    I32,
    I64,
    address,
    dot_bf16,
    horizontal_sum,
    load,
    loop,
    multiply_add,
    opaque,
    prefetch,
)
from fiddler.kernels.codegen.variant import KernelVariant, compiled, constant_of
from fiddler.kernels.formats import plain_format_of
from fiddler.kernels.formats.half import BF16, halves
from fiddler.kernels.matmul.read_ahead import read_ahead

__all__ = ["LINE", "dot_tile", "dot_tokens"]

LINE = 64  # bytes


def _odd_lines_first(b: ir.IRBuilder, base: ir.Value) -> list[ir.Value]:
    """Bases for prefetching the odd cache line of each 128-byte pair first: of its first and of its second prefetch.

    Zen 5 reads several tokens at 0.7 of the speed if the even line is requested right before the odd one. `base` is
    rounded up to a line: the weights before it have loaded the line that it shares with them.
    """
    line = b.and_(b.add(base, ir.Constant(I64, LINE - 1)), ir.Constant(I64, -LINE))
    swap = b.sub(ir.Constant(I64, LINE), b.and_(line, ir.Constant(I64, LINE)))
    return [b.add(line, swap), b.sub(line, swap)]


def _dot_rows(variant: KernelVariant, tokens: int) -> int:
    """Weight rows of a dot-product tile: at most 4, as many as leave registers for the operands.

    They share the loads of x, which does not fit the first-level cache with K = 14336: on Zen 3 one token read at 0.83
    of the speed of plain reads with one row, at 0.96 with four. K-blocked: one row; nothing else was measured.
    """
    if tokens == 1:
        return 4
    if _is_blocked(variant, tokens):
        return 1
    few = 2 if _x_from_memory(variant, tokens) else 1
    return next((rows for rows in (4, 2) if rows * (tokens + 1) + 2 <= variant.tier.registers), few)


def _is_blocked(variant: KernelVariant, tokens: int) -> bool:
    """Whether so many tokens are multiplied K-block by K-block."""
    return variant.k_blocked and tokens >= variant.tuning.compute_bound_tokens


def _x_from_memory(variant: KernelVariant, tokens: int) -> bool:
    """Whether sums and weights of two rows fill all registers, so that each multiplication takes x from memory."""
    return not variant.bf16_rows and 0 <= variant.tier.registers - 2 * (tokens + 1) < 2


def _dot_tokens(variant: KernelVariant) -> int:
    if variant.amx:
        return 2
    if variant.k_blocked:
        return variant.tuning.k_blocked_tile_tokens
    return {32: 5, 16: 6 if variant.bf16_rows else 7}.get(variant.tier.registers, 4)


dot_tokens = constant_of(_dot_tokens, types.intp)
"""Maximum tokens of a dot-product tile. With AMX, only one or two tokens come here, or any number with an odd K.

32 registers: six tokens and four rows need too many addresses. 16 registers: seven tokens fit where x can come from
memory; bf16 pairs cannot, because they are split in registers.
"""


@compiled
def dot_tile(
    _context: Any,
    variant: Any,
    tokens: Any,
    w: Any,
    ldw: Any,
    rows: Any,
    x: Any,
    ldx: Any,
    c: Any,
    ldc: Any,
    k: Any,
    prefetch_distance: Any,
) -> Any:
    """c[r * ldc + m] += sum over k of w[r * ldw + k] * x[m * ldx + k], for r < rows and m < tokens (1 to `dot_tokens`).

    `w`: aligned weights; `x`: activations of the variant's type in the rows layout; `c`: float32; `ldw`, `ldx` and
    `ldc` count their elements. Reads nothing past k. Prefetches the weights that are read `prefetch_distance` bytes
    later, also of the rows that follow; K-blocked, with many tokens, those at that distance from each address.
    """
    kind = variant.variant
    signature = types.void(variant, *([types.intp] * 10))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, tokens, *others = arguments
        none, done = b.append_basic_block("dot.none"), b.append_basic_block("dot.done")
        switch = b.switch(tokens, none)
        for count in range(1, _dot_tokens(kind) + 1):  # a tile for each number of tokens
            case = b.append_basic_block(f"dot.{count}")
            switch.add_case(ir.Constant(I64, count), case)
            b.position_at_end(case)
            _generate_tile(b, kind, count, *others)
            b.branch(done)
        b.position_at_end(none)
        b.unreachable()
        b.position_at_end(done)
        return context.get_dummy_value()

    return signature, generate


def _generate_tile(
    b: ir.IRBuilder,
    kind: KernelVariant,
    M: int,
    w: ir.Value,
    ldw: ir.Value,
    rows: ir.Value,
    x: ir.Value,
    ldx: ir.Value,
    c: ir.Value,
    ldc: ir.Value,
    K: ir.Value,
    prefetch_distance: ir.Value,
) -> None:
    """`dot_tile` for M tokens."""
    R, lanes, blocked = _dot_rows(kind, M), kind.tier.lanes, _is_blocked(kind, M)
    chains = 2 if blocked else max(1, kind.tier.registers // 2 // (R * M))  # independent sums of each element
    step = lanes * (2 if kind.bf16_rows else 1)
    weight_format = plain_format_of(kind)
    w_width = weight_format.weight_bytes
    x_width, x_from_memory = 2 if kind.bf16_rows else 4, _x_from_memory(kind, M)
    unroll = max(chains, LINE // (w_width * step))
    level = 2 if blocked else kind.tuning.weights_prefetch_level
    stored = ir.IntType(8 * w_width)
    floats, words, weights_vector = (
        ir.VectorType(element, count) for element, count in ((F32, lanes), (I32, lanes), (stored, step))
    )
    column = [b.add(x, b.mul(ldx, ir.Constant(I64, x_width * m))) for m in range(M)]
    bytes_of_row, last = b.mul(ldw, ir.Constant(I64, w_width)), b.sub(rows, ir.Constant(I64, 1))
    zero = ir.Constant(I64, 0)
    whole, vectors = (b.sub(K, b.srem(K, ir.Constant(I64, count))) for count in (step * unroll, step))
    side_by_side = ir.Constant(I64, R)
    later = read_ahead(
        *(b, b.sdiv(prefetch_distance, side_by_side), b.mul(K, ir.Constant(I64, w_width))),
        b.mul(bytes_of_row, side_by_side),
    )

    def operands(base: ir.Value, k: ir.Value, width: int, half: int) -> ir.Value:
        pointer = address(b, base, k, width)
        if kind.bf16_rows:
            pairs = load(b, pointer, words, 2)
            return pairs if kind.bf16_pairs else halves(b, pairs)[half]
        if width == 4:
            return load(b, pointer, floats, 4)
        return weight_format.decode(b, kind, load(b, pointer, weights_vector, w_width))

    def products(row: list[ir.Value], k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        multiply, result = dot_bf16 if kind.bf16_pairs else multiply_add, list(sums)
        # hidden from LLVM, which otherwise loads x once, into a register that it lacks
        reloaded_k = opaque(b, k) if x_from_memory else k
        for half in range(2 if kind.bf16_rows and not kind.bf16_pairs else 1):
            if half == 1 and kind.tier.registers <= 2 * R * M:
                k = opaque(b, k)  # both halves of all operands would not fit the registers
            weights = [operands(base, k, w_width, half) for base in row]
            for m in range(M):
                value = operands(column[m], k, x_width, half)
                for r in range(R):
                    if r > 0 and x_from_memory:
                        value = operands(column[m], reloaded_k, x_width, half)
                    result[r * M + m] = multiply(b, result[r * M + m], weights[r], value)
        return result

    def row_group(first: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
        row_numbers = [b.add(first, ir.Constant(I64, r)) for r in range(R)]
        # with too few rows, the last one again
        index = [b.select(b.icmp_signed("<", r, last), r, last) for r in row_numbers]
        row = [b.add(w, b.mul(r, bytes_of_row)) for r in index]
        lines = [row] * 2  # bases of even and odd cache lines
        if blocked:
            lines = [[base] for base in _odd_lines_first(b, b.add(row[0], prefetch_distance))]

        def unrolled(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            sums = list(sums)
            distance = zero if blocked else later.at(b, b.mul(k, ir.Constant(I64, w_width)))
            for u in range(unroll):
                at = b.add(k, ir.Constant(I64, u * step))
                if w_width * u * step % LINE == 0:
                    for base in lines[w_width * u * step // LINE % 2]:
                        prefetch(b, address(b, b.add(base, distance), at, w_width), level)
                now = slice(u % chains * R * M, (u % chains + 1) * R * M)
                sums[now] = products(row, at, sums[now])
            return sums

        def one_vector(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            return [*products(row, k, sums[: R * M]), *sums[R * M :]]

        sums = [ir.Constant(floats, [0.0] * lanes)] * (R * M * chains)
        k, sums = loop(b, "whole", zero, whole, step * unroll, sums, unrolled)
        if unroll > 1:
            k, sums = loop(b, "vectors", k, vectors, step, sums, one_vector)
        totals = [horizontal_sum(b, reduce(b.fadd, sums[i :: R * M])) for i in range(R * M)]

        def tail(k: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
            stored_weights = [load(b, address(b, base, k, w_width), stored, w_width) for base in row]
            weights = [weight_format.decode_one(b, kind, each) for each in stored_weights]
            pointers = [address(b, base, k, x_width) for base in column]
            if kind.bf16_rows:
                values = [BF16.decode_one(b, kind, load(b, pointer, I16, 2)) for pointer in pointers]
            else:
                values = [load(b, pointer, F32, 4) for pointer in pointers]
            return [multiply_add(b, totals[i], weights[i // M], values[i % M]) for i in range(R * M)]

        _, totals = loop(b, "tail", k, K, 1, totals, tail)
        c_pointers = [
            b.bitcast(address(b, c, b.add(b.mul(r, ldc), ir.Constant(I64, m)), 4), F32.as_pointer())
            for r in index
            for m in range(M)
        ]
        # read all before writing any: a repeated row counts once
        before = [b.load(c_pointer) for c_pointer in c_pointers]
        for c_pointer, old, total in zip(c_pointers, before, totals, strict=True):
            b.store(b.fadd(old, total), c_pointer)
        return []

    loop(b, "rows", zero, rows, R, [], row_group)
