"""The inner loop for many tokens: outer products of weight rows and 16 or more packed tokens, in vector registers.

Packed: one vector holds a value of several tokens. Knows pointers and strides only.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types

from fiddler.kernels.codegen.llvm import (
    F32,
    I32,
    I64,
    address,
    dot_bf16,
    load,
    loop,
    multiply_add,
    prefetch,
    splat,
)
from fiddler.kernels.codegen.variant import compiled
from fiddler.kernels.formats import plain_format_of
from fiddler.kernels.matmul.dot_tiles import LINE

__all__ = ["outer_tile", "widen_row"]


@compiled
def outer_tile(
    _context: Any,
    variant: Any,
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

    `rows`: "several" (the tier's `outer_rows`) or "one". Weights and activations are words of 4 bytes: a bf16 pair, or
    a float32 (weights that `widen_row` has written). `x` is a panel of the packed layout. Each weight is broadcast from
    its row; there is no horizontal sum.
    """
    kind = variant.variant
    R = kind.tier.outer_rows if rows.literal_value == "several" else 1
    MV = tokens.literal_value // kind.tier.lanes
    memory_bound = kind.bf16_pairs and MV <= 2  # so few tokens wait for the weights
    unroll = LINE // 4 if memory_bound else kind.tuning.outer_unroll
    chains = 2 if MV == 1 else 1  # independent sums: one vector a row is too few, and leaves registers free
    signature = types.void(variant, rows, tokens, *([types.intp] * 7))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, ldw, x, ldx, c, ldc, count = arguments[3:]
        lanes = kind.tier.lanes
        floats = ir.VectorType(F32, lanes)
        vector, word = (ir.VectorType(I32, lanes), I32) if kind.bf16_pairs else (floats, F32)
        multiply = dot_bf16 if kind.bf16_pairs else multiply_add
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
                    prefetch(
                        b, address(b, row[r], b.add(p, ir.Constant(I64, kind.tuning.outer_prefetch_bytes // 4)), 4)
                    )
            return sums

        zeros = [ir.Constant(floats, [0.0] * lanes)] * (R * MV * chains)
        whole = b.and_(count, ir.Constant(I64, -unroll))
        p, sums = loop(b, "whole", ir.Constant(I64, 0), whole, unroll, zeros, several)
        sums = [reduce(b.fadd, sums[i :: R * MV]) for i in range(R * MV)]
        _, sums = loop(b, "tail", p, count, 1, sums, step)
        for r in range(R):
            for v in range(MV):
                at = b.add(b.mul(ldc, ir.Constant(I64, r)), ir.Constant(I64, lanes * v))
                pointer = address(b, c, at, 4)
                total = b.fadd(load(b, pointer, floats, 4), sums[r * MV + v])
                b.store(total, b.bitcast(pointer, floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate


@compiled
def widen_row(_context: Any, variant: Any, w: Any, out: Any, k: Any, prefetch_distance: Any) -> Any:
    """out[i] = w[i] as float32 for i < k; prefetches the weights `prefetch_distance` bytes further."""
    kind = variant.variant
    weights = plain_format_of(kind)
    width = weights.weight_bytes

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, w, out, K, prefetch_distance = arguments
        stored = ir.IntType(8 * width)
        vector = ir.VectorType(stored, kind.tier.lanes)

        def several(k: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            prefetch(b, address(b, b.add(w, prefetch_distance), k, width), kind.tuning.weights_prefetch_level)
            values = weights.decode(b, kind, load(b, address(b, w, k, width), vector, width))
            b.store(values, b.bitcast(address(b, out, k, 4), values.type.as_pointer())).align = 4
            return []

        def one(k: ir.Value, _: list[ir.Value]) -> list[ir.Value]:
            value = weights.decode_one(b, kind, load(b, address(b, w, k, width), stored, width))
            b.store(value, b.bitcast(address(b, out, k, 4), F32.as_pointer()))
            return []

        whole = b.sub(K, b.srem(K, ir.Constant(I64, kind.tier.lanes)))
        k, _ = loop(b, "whole", ir.Constant(I64, 0), whole, kind.tier.lanes, [], several)
        loop(b, "tail", k, K, 1, [], one)
        return context.get_dummy_value()

    return types.void(variant, *([types.intp] * 4)), generate
