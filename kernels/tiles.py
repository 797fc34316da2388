"""The inner loops: small matrix products held in vector registers. Knows pointers and strides only.

`dot_tile`: one weight row with a few tokens, for as long as reading the weights is what takes the time. `outer_tile`:
several weight rows x 16 or more tokens, packed so that one vector holds a value of several tokens. A tile is
generated for its `Product`: the kinds of weights and activations and the instructions that multiply them. Pointers
are plain addresses.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.cpu import passes_weights
from fiddler.kernels.instructions import (
    F32,
    I8,
    I16,
    I32,
    I64,
    PASSING,
    address,
    dot_bf16,
    horizontal_sum,
    lane_mask,
    load,
    loop,
    masked_load,
    multiply_add,
    prefetch,
    round_to_bf16,
    splat,
    widen,
)
from fiddler.kernels.product import compiled

__all__ = [
    "SEVERAL",
    "copy_words",
    "dot_tile",
    "outer_tile",
    "store_activation",
    "store_float",
    "store_pair",
    "store_pairs",
    "widen_row",
]

SEVERAL = 5  # tokens from which on what is asked for ahead goes to the second-level cache: much later it is used
_AHEAD_IN_ROWS = 1024  # bytes: how far before its use a cache line of weights is asked for, in each of several rows
_LINE = 64  # bytes
_UNROLL = 4


@compiled
def store_activation(_context: Any, product: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`, as this product keeps its activations."""
    kind = product.product

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, base, index, value = arguments
        if kind.in_pairs:
            bits = b.trunc(round_to_bf16(b, value), I16)
            b.store(bits, b.bitcast(address(b, base, index, 2), I16.as_pointer()))
        else:
            if kind.activations == "bf16":
                value = b.bitcast(b.shl(round_to_bf16(b, value), ir.Constant(I32, 16)), F32)
            b.store(value, b.bitcast(address(b, base, index, 4), F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(product, types.intp, types.intp, types.float32), generate


@compiled
def store_float(_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, value = arguments
        b.store(value, b.bitcast(address(b, base, index, 4), F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


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
    """`store_pair` for 16 neighbours: words from `index` on, of the float32 at the addresses `low` and `high`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, low, high = arguments
        floats, words = ir.VectorType(F32, 16), ir.VectorType(I32, 16)
        lows, highs = (
            round_to_bf16(b, load(b, address(b, place, ir.Constant(I64, 0), 1), floats, 4)) for place in (low, high)
        )
        both = b.or_(lows, b.shl(highs, ir.Constant(words, [16] * 16)))
        b.store(both, b.bitcast(address(b, base, index, 4), words.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), generate


@compiled
def copy_words(_context: Any, to: Any, source: Any, count: Any) -> Any:
    """Copy `count` words of 4 bytes between addresses."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        to, source, count = arguments
        cgutils.raw_memcpy(b, b.inttoptr(to, I8.as_pointer()), b.inttoptr(source, I8.as_pointer()), count, 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), generate


def _odd_lines_first(b: ir.IRBuilder, base: ir.Value) -> list[ir.Value]:
    """From where to count the first and the second line of two, so that of 128 aligned bytes the latter come first.

    On Zen 5 several tokens read at 0.7 of the speed where the former are asked for right before the latter. `base` is
    rounded up to a line: of weights that lie across lines, the first one came with what lies before it.
    """
    line = b.and_(b.add(base, ir.Constant(I64, _LINE - 1)), ir.Constant(I64, -_LINE))
    swap = b.sub(ir.Constant(I64, _LINE), b.and_(line, ir.Constant(I64, _LINE)))
    return [b.add(line, swap), b.sub(line, swap)]


@compiled
def dot_tile(_context: Any, product: Any, tokens: Any, w: Any, x: Any, ldx: Any, c: Any, k: Any, ahead: Any) -> Any:
    """c[m] += sum over k of w[k] * x[m * ldx + k], for m < tokens (a constant).

    `w` is one row of 2-byte aligned weights, `x` activations of the product's kind in the rows layout, `ldx` counts
    its elements; `c` is float32. Nothing past k is read; what lies `ahead` bytes further is prefetched.
    """
    M, kind = tokens.literal_value, product.product
    unroll = _UNROLL if M <= 4 else 2  # as many sums as there are registers for
    level = 2 if M >= SEVERAL else PASSING if passes_weights() else 1
    signature = types.void(product, tokens, *([types.intp] * 6))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, x, ldx, c, K, ahead = arguments[2:]
        floats, words = ir.VectorType(F32, kind.tier.lanes), ir.VectorType(I32, kind.tier.lanes)
        step = kind.tier.lanes * (2 if kind.in_pairs else 1)
        bits = ir.VectorType(I16, step)
        stored, x_width = (bits, 2) if kind.in_pairs else (words, 4)
        column = [b.add(x, b.mul(ldx, ir.Constant(I64, x_width * m))) for m in range(M)]

        def products(k: ir.Value, sums: list[ir.Value], mask: ir.Value | None) -> list[ir.Value]:
            def fetch(base: ir.Value, vector: ir.VectorType, width: int) -> ir.Value:
                pointer = address(b, base, k, width)
                if mask is None:
                    return load(b, pointer, vector, width)
                return masked_load(b, pointer, vector, width, mask)

            weights = fetch(w, bits, 2)
            xs = [fetch(base, stored, x_width) for base in column]
            if kind.in_pairs:
                pairs = b.bitcast(weights, words)
                return [
                    dot_bf16(b, total, pairs, b.bitcast(value, words)) for total, value in zip(sums, xs, strict=True)
                ]
            values = widen(b, kind, weights)
            return [
                multiply_add(b, total, values, b.bitcast(value, floats)) for total, value in zip(sums, xs, strict=True)
            ]

        def several(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            result: list[ir.Value] = []
            for u in range(unroll):
                at = b.add(k, ir.Constant(I64, u * step))
                if 2 * u * step % _LINE == 0:
                    prefetch(b, address(b, following[2 * u * step // _LINE % 2], at, 2), level)
                result += products(at, sums[u * M : (u + 1) * M], None)
            return result

        following = [b.add(w, ahead)] * 2  # from which even and odd lines are counted
        if M >= SEVERAL and 2 * step * unroll % (2 * _LINE) == 0:
            following = _odd_lines_first(b, following[0])
        zero = ir.Constant(I64, 0)
        whole = b.sub(K, b.srem(K, ir.Constant(I64, step * unroll)))
        sums = [ir.Constant(floats, [0.0] * kind.tier.lanes)] * (M * unroll)
        k, sums = loop(b, "whole", zero, whole, step * unroll, sums, several)
        for u in range(1, unroll):
            for m in range(M):
                sums[m] = b.fadd(sums[m], sums[u * M + m])

        def rest(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            return products(k, sums, lane_mask(b, step, b.sub(K, k)))

        _, sums = loop(b, "tail", k, K, step, sums[:M], rest)
        for m in range(M):
            pointer = b.bitcast(address(b, c, ir.Constant(I64, m), 4), F32.as_pointer())
            b.store(b.fadd(b.load(pointer), horizontal_sum(b, sums[m])), pointer)
        return context.get_dummy_value()

    return signature, generate


@compiled
def outer_tile(
    _context: Any,
    product: Any,
    rows: Any,
    tokens: Any,
    w: Any,
    ldw: Any,
    x: Any,
    ldx: Any,
    c: Any,
    ldc: Any,
    words: Any,
) -> Any:
    """c[r * ldc + t] += sum over p of w[r * ldw + p] . x[p * ldx + t], for t < tokens (a constant: 16, 32 or 48).

    `rows`: "several" (as many as the tier's `outer_rows`) or "one". Weights and activations are 4-byte words: a pair
    of bf16, or a float32 (weights that `widen_row` has written). `x` is a panel of the packed layout. Each weight is
    broadcast from its row; there is no horizontal sum.
    """
    kind = product.product
    R = kind.tier.outer_rows if rows.literal_value == "several" else 1
    MV = tokens.literal_value // kind.tier.lanes
    memory_bound = kind.in_pairs and MV <= 2  # so few tokens wait for weights
    unroll = _LINE // 4 if memory_bound else _UNROLL
    chains = 2 if MV == 1 else 1  # of sums, which take turns: one vector a row is too few, and leaves registers free
    signature = types.void(product, rows, tokens, *([types.intp] * 7))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, ldw, x, ldx, c, ldc, count = arguments[3:]
        lanes = kind.tier.lanes
        floats = ir.VectorType(F32, lanes)
        vector, word = (ir.VectorType(I32, lanes), I32) if kind.in_pairs else (floats, F32)
        multiply = dot_bf16 if kind.in_pairs else multiply_add
        row = [b.add(w, b.mul(ldw, ir.Constant(I64, 4 * r))) for r in range(R)]

        def step(p: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            base = b.add(x, b.mul(b.mul(p, ldx), ir.Constant(I64, 4)))
            xs = [load(b, address(b, base, ir.Constant(I64, lanes * v), 4), vector, 4) for v in range(MV)]
            result = []
            for r in range(R):
                repeated = splat(b, load(b, address(b, row[r], p, 4), word, 2), lanes)
                result += [multiply(b, sums[r * MV + v], xs[v], repeated) for v in range(MV)]
            return result

        def several(p: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            for u in range(unroll):
                now = slice(u % chains * R * MV, (u % chains + 1) * R * MV)
                sums[now] = step(b.add(p, ir.Constant(I64, u)), sums[now])
            if memory_bound:
                for r in range(R):
                    prefetch(b, address(b, row[r], b.add(p, ir.Constant(I64, _AHEAD_IN_ROWS // 4)), 4))
            return sums

        zeros = [ir.Constant(floats, [0.0] * lanes)] * (R * MV * chains)
        whole = b.and_(count, ir.Constant(I64, -unroll))
        p, sums = loop(b, "whole", ir.Constant(I64, 0), whole, unroll, zeros, several)
        sums = [reduce(b.fadd, sums[i :: R * MV]) for i in range(R * MV)]
        _, sums = loop(b, "tail", p, count, 1, sums, step)
        for r in range(R):
            for v in range(MV):
                at = b.add(b.mul(ldc, ir.Constant(I64, r)), ir.Constant(I64, lanes * v))
                place = address(b, c, at, 4)
                total = b.fadd(load(b, place, floats, 4), sums[r * MV + v])
                b.store(total, b.bitcast(place, floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate


@compiled
def widen_row(_context: Any, product: Any, w: Any, out: Any, k: Any, ahead: Any) -> Any:
    """out[i] = w[i] as float32 for i < k; `out` has room for a multiple of 16.

    What lies `ahead` bytes further is prefetched.
    """
    kind = product.product

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, w, out, K, ahead = arguments
        bits = ir.VectorType(I16, kind.tier.lanes)

        def write(k: ir.Value, weights: ir.Value) -> list[ir.Value]:
            prefetch(b, address(b, b.add(w, ahead), k, 2), PASSING if passes_weights() else 1)
            values = widen(b, kind, weights)
            b.store(values, b.bitcast(address(b, out, k, 4), values.type.as_pointer())).align = 4
            return []

        whole = b.sub(K, b.srem(K, ir.Constant(I64, kind.tier.lanes)))
        k, _ = loop(
            b,
            "whole",
            ir.Constant(I64, 0),
            whole,
            kind.tier.lanes,
            [],
            lambda k, _: write(k, load(b, address(b, w, k, 2), bits, 2)),
        )

        def rest(k: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            mask = lane_mask(b, kind.tier.lanes, b.sub(K, k))
            return write(k, masked_load(b, address(b, w, k, 2), bits, 2, mask))

        loop(b, "tail", k, K, kind.tier.lanes, [], rest)
        return context.get_dummy_value()

    return types.void(product, *([types.intp] * 4)), generate
