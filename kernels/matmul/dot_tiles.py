"""The inner loops: small matrix products held in vector registers. Knows pointers and strides only.

`dot_tile`: weight rows with a few tokens, for as long as reading the weights is what takes the time. `outer_tile`:
several weight rows x 16 or more tokens, packed so that one vector holds a value of several tokens. A tile is
generated for its `KernelVariant`: the kinds of weights and activations and the instructions that multiply them. Pointers
are plain addresses.
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
    PASSING,
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
from fiddler.kernels.formats.half import halves, widen, widen_one
from fiddler.kernels.machine.isa import on_zen

__all__ = ["LINE", "SEVERAL", "dot_tile", "dot_tokens", "weights_level"]

SEVERAL = 5  # tokens from which on the cores, not the memory, may be what takes the time
LINE = 64  # bytes


def weights_level() -> int:
    """The level to prefetch weights into, which are read once.

    Non-temporal, they leave code and data in the caches of Zen: 4 % of a token. On Emerald Rapids they are gone again
    before they are used: one token read 61 to 70 GB/s so, 95 to 119 otherwise.
    """
    return PASSING if on_zen() else 1


def _odd_lines_first(b: ir.IRBuilder, base: ir.Value) -> list[ir.Value]:
    """From where to count the first and the second line of two, so that of 128 aligned bytes the latter come first.

    On Zen 5 several tokens read at 0.7 of the speed where the former are asked for right before the latter. `base` is
    rounded up to a line: of weights that lie across lines, the first one came with what lies before it.
    """
    line = b.and_(b.add(base, ir.Constant(I64, LINE - 1)), ir.Constant(I64, -LINE))
    swap = b.sub(ir.Constant(I64, LINE), b.and_(line, ir.Constant(I64, LINE)))
    return [b.add(line, swap), b.sub(line, swap)]


def _dot_rows(variant: KernelVariant, tokens: int) -> int:
    """Weight rows that a dot-product tile takes at once: at most 4, as many as leave registers for the operands.

    They share what is loaded of x, which does not fit the first-level cache with K = 14336: on Zen 3 one token read at
    0.83 of the speed of plain reads with one row, at 0.96 with four. In parts it is one row: nothing else was measured.
    """
    if tokens == 1:
        return 4
    if variant.k_blocked and tokens >= SEVERAL:
        return 1
    few = 2 if _x_from_memory(variant, tokens) else 1
    return next((rows for rows in (4, 2) if rows * (tokens + 1) + 2 <= variant.tier.registers), few)


def _x_from_memory(variant: KernelVariant, tokens: int) -> bool:
    """Whether sums and weights of two rows take all registers, so that each product has its x from memory."""
    return not variant.bf16_rows and 0 <= variant.tier.registers - 2 * (tokens + 1) < 2


def _dot_tokens(variant: KernelVariant) -> int:
    if variant.amx:
        return 2
    if variant.k_blocked:
        return 8
    return {32: 5, 16: 6 if variant.bf16_rows else 7}.get(variant.tier.registers, 4)


dot_tokens = constant_of(_dot_tokens, types.intp)
"""Tokens of a dot-product tile, at most. Beside tile registers only one or two come, or any number of an odd width.

With 32 registers six of them and four rows have too many addresses. With 16, seven fit where x can come from memory,
and words of two bf16 cannot: they are split in registers.
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
    ahead: Any,
) -> Any:
    """c[r * ldc + m] += sum over k of w[r * ldw + k] * x[m * ldx + k], for r < rows and m < tokens (a constant).

    `w` are 2-byte aligned weights, `x` activations of the product's kind in the rows layout, `c` is float32; `ldw`,
    `ldx` and `ldc` count their elements. Nothing past k is read. What is read when `ahead` more bytes have been, rows
    that follow included, is prefetched; in parts, with SEVERAL tokens, what lies so many bytes behind each address.
    """
    M, kind = tokens.literal_value, variant.variant
    R, lanes = _dot_rows(kind, M), kind.tier.lanes
    blocked = kind.k_blocked and M >= SEVERAL
    chains = 2 if blocked else max(1, kind.tier.registers // 2 // (R * M))  # of sums of each, which take turns
    step = lanes * (2 if kind.bf16_rows else 1)
    unroll = max(chains, LINE // (2 * step))
    x_width, x_from_memory = 2 if kind.bf16_rows else 4, _x_from_memory(kind, M)
    level = 2 if blocked else weights_level()
    signature = types.void(variant, tokens, *([types.intp] * 9))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, ldw, rows, x, ldx, c, ldc, K, ahead = arguments[2:]
        floats, words, bits = (ir.VectorType(kept, count) for kept, count in ((F32, lanes), (I32, lanes), (I16, step)))
        column = [b.add(x, b.mul(ldx, ir.Constant(I64, x_width * m))) for m in range(M)]
        bytes_of_row, last = b.mul(ldw, ir.Constant(I64, 2)), b.sub(rows, ir.Constant(I64, 1))
        zero = ir.Constant(I64, 0)
        whole = b.sub(K, b.srem(K, ir.Constant(I64, step * unroll)))
        near = b.sdiv(ahead, ir.Constant(I64, R))
        turn = b.sub(K, b.sdiv(near, ir.Constant(I64, 2)))  # from where on that lies in other rows
        beyond = b.add(b.sub(near, b.mul(K, ir.Constant(I64, 2))), b.mul(bytes_of_row, ir.Constant(I64, R)))

        def operands(base: ir.Value, k: ir.Value, width: int, half: int) -> ir.Value:
            place = address(b, base, k, width)
            if kind.bf16_rows:
                pairs = load(b, place, words, 2)
                return pairs if kind.bf16_pairs else halves(b, pairs)[half]
            return load(b, place, floats, 4) if width == 4 else widen(b, kind, load(b, place, bits, 2))

        def products(row: list[ir.Value], k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            multiply, result = dot_bf16 if kind.bf16_pairs else multiply_add, list(sums)
            again = opaque(b, k) if x_from_memory else k  # else LLVM loads x once, into a register that is not there
            for half in range(2 if kind.bf16_rows and not kind.bf16_pairs else 1):
                if half == 1 and kind.tier.registers <= 2 * R * M:
                    k = opaque(b, k)  # both halves of all operands would not fit the registers
                weights = [operands(base, k, 2, half) for base in row]
                for m in range(M):
                    value = operands(column[m], k, x_width, half)
                    for r in range(R):
                        if r > 0 and x_from_memory:
                            value = operands(column[m], again, x_width, half)
                        result[r * M + m] = multiply(b, result[r * M + m], weights[r], value)
            return result

        def of_rows(first: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            further = [b.add(first, ir.Constant(I64, r)) for r in range(R)]
            index = [b.select(b.icmp_signed("<", r, last), r, last) for r in further]  # the last one again, if too few
            row = [b.add(w, b.mul(r, bytes_of_row)) for r in index]
            lines = [row] * 2  # from where even and odd ones are counted
            if blocked:
                lines = [[base] for base in _odd_lines_first(b, b.add(row[0], ahead))]

            def several(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
                sums = list(sums)
                distance = zero if blocked else b.select(b.icmp_signed("<", k, turn), near, beyond)
                for u in range(unroll):
                    at = b.add(k, ir.Constant(I64, u * step))
                    if 2 * u * step % LINE == 0:
                        for base in lines[2 * u * step // LINE % 2]:
                            prefetch(b, address(b, b.add(base, distance), at, 2), level)
                    now = slice(u % chains * R * M, (u % chains + 1) * R * M)
                    sums[now] = products(row, at, sums[now])
                return sums

            sums = [ir.Constant(floats, [0.0] * lanes)] * (R * M * chains)
            k, sums = loop(b, "whole", zero, whole, step * unroll, sums, several)
            totals = [horizontal_sum(b, reduce(b.fadd, sums[i :: R * M])) for i in range(R * M)]

            def one(k: ir.Value, totals: list[ir.Value]) -> list[ir.Value]:
                weights = [widen_one(b, kind, load(b, address(b, base, k, 2), I16, 2)) for base in row]
                places = [address(b, base, k, x_width) for base in column]
                if kind.bf16_rows:
                    values = [widen_one(b, kind, load(b, place, I16, 2)) for place in places]
                else:
                    values = [load(b, place, F32, 4) for place in places]
                return [multiply_add(b, totals[i], weights[i // M], values[i % M]) for i in range(R * M)]

            _, totals = loop(b, "tail", k, K, 1, totals, one)
            places = [
                b.bitcast(address(b, c, b.add(b.mul(r, ldc), ir.Constant(I64, m)), 4), F32.as_pointer())
                for r in index
                for m in range(M)
            ]
            # all are read before one is written: a row that is there twice counts once
            before = [b.load(place) for place in places]
            for place, old, total in zip(places, before, totals, strict=True):
                b.store(b.fadd(old, total), place)
            return []

        loop(b, "rows", zero, rows, R, [], of_rows)
        return context.get_dummy_value()

    return signature, generate
