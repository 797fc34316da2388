"""The inner loops: small matrix products held in registers, written as LLVM IR. Knows pointers and strides only.

`dot_tile` keeps R x M dot products along a contiguous K. `outer_tile` keeps R weight rows x 16 MV tokens, the
tokens packed so that one vector holds 16 of them. A tile is generated for its `Product`: the kind of weights and
activations and the instructions that multiply them. Pointers are plain addresses, strides count elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.product import Product, compiled

__all__ = ["dot_tile", "outer_tile", "store_activation", "store_float", "store_pair"]

_F16, _F32 = ir.HalfType(), ir.FloatType()
_I1, _I16, _I32, _I64 = (ir.IntType(width) for width in (1, 16, 32, 64))


def _address(b: ir.IRBuilder, base: ir.Value, index: ir.Value, width: int) -> ir.Value:
    """base + index * width bytes, as a pointer."""
    scaled = b.mul(index, ir.Constant(_I64, width)) if width != 1 else index
    return b.inttoptr(b.add(base, scaled), ir.IntType(8).as_pointer())


def _load(b: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType, align: int) -> ir.Value:
    value = b.load(b.bitcast(pointer, vector.as_pointer()))
    value.align = align
    return value


def _masked_load(b: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType, align: int, mask: ir.Value) -> ir.Value:
    """Lanes whose mask is off are zero, and their memory is not touched."""
    suffix = f"v{vector.count}i{vector.element.width}"
    function = cgutils.get_or_insert_function(
        b.module,
        ir.FunctionType(vector, [vector.as_pointer(), _I32, ir.VectorType(_I1, vector.count), vector]),
        f"llvm.masked.load.{suffix}.p0",
    )
    typed = b.bitcast(pointer, vector.as_pointer())
    return b.call(function, [typed, ir.Constant(_I32, align), mask, ir.Constant(vector, [0] * vector.count)])


def _lane_mask(b: ir.IRBuilder, count: int, left: ir.Value) -> ir.Value:
    """Lane i is on while i < left."""
    lanes = ir.VectorType(_I64, count)
    splat = b.insert_element(ir.Constant(lanes, ir.Undefined), left, ir.Constant(_I32, 0))
    splat = b.shuffle_vector(
        splat, ir.Constant(lanes, ir.Undefined), ir.Constant(ir.VectorType(_I32, count), [0] * count)
    )
    return b.icmp_signed("<", ir.Constant(lanes, list(range(count))), splat)


def _widen(b: ir.IRBuilder, product: Product, bits: ir.Value) -> ir.Value:
    """A vector of 16-bit weights as float32."""
    count = bits.type.count
    wide, floats = ir.VectorType(_I32, count), ir.VectorType(_F32, count)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(wide, [value] * count)

    if product.weights == "bf16":
        return b.bitcast(b.shl(b.zext(bits, wide), constant(16)), floats)
    if product.tier.half_convert:
        return b.fpext(b.bitcast(bits, ir.VectorType(_F16, count)), floats)
    # exponent and mantissa moved into place, then scaled by 2**112: exact, subnormals included
    word = b.zext(bits, wide)
    magnitude = b.bitcast(b.shl(b.and_(word, constant(0x7FFF)), constant(13)), floats)
    scaled = b.bitcast(b.fmul(magnitude, ir.Constant(floats, [2.0**112] * count)), wide)
    special = b.icmp_unsigned(">=", b.and_(word, constant(0x7FFF)), constant(0x7C00))  # infinities and NaNs
    scaled = b.select(special, b.or_(scaled, constant(0x7F800000)), scaled)
    return b.bitcast(b.or_(scaled, b.shl(b.and_(word, constant(0x8000)), constant(16))), floats)


def _dot_bf16(b: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    floats, pairs = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(floats, [floats, pairs, pairs]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    return b.call(function, [total, left, right])


def _multiply_add(b: ir.IRBuilder, total: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
    return b.fadd(total, b.fmul(left, right, flags=("contract",)), flags=("contract",))


def _horizontal_sum(b: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(_F32, [_F32, vector.type]), f"llvm.vector.reduce.fadd.v{vector.type.count}f32"
    )
    return b.call(function, [ir.Constant(_F32, -0.0), vector], fastmath=("reassoc",))


def _loop(
    b: ir.IRBuilder,
    name: str,
    begin: ir.Value,
    end: ir.Value,
    step: int,
    carried: list[ir.Value],
    body: Callable[[ir.Value, list[ir.Value]], list[ir.Value]],
) -> tuple[ir.Value, list[ir.Value]]:
    """for (k = begin; k < end; k += step) carried = body(k, carried). Returns the k it stopped at and `carried`."""
    before = b.block
    head, inside, after = (b.append_basic_block(f"{name}.{part}") for part in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    k = b.phi(_I64)
    k.add_incoming(begin, before)
    phis = [b.phi(value.type) for value in carried]
    for phi, value in zip(phis, carried, strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", k, end), inside, after)
    b.position_at_end(inside)
    results = body(k, list(phis))
    following = b.add(k, ir.Constant(_I64, step))
    k.add_incoming(following, b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return k, list(phis)


def _round_to_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """float32 -> the nearest bf16's bits, ties to even, in the low half of an i32; a NaN stays one."""

    def constant(bits: int) -> ir.Constant:
        return ir.Constant(_I32, bits)

    bits = b.bitcast(value, _I32)
    even = b.and_(b.lshr(bits, constant(16)), constant(1))
    rounded = b.lshr(b.add(b.add(bits, constant(0x7FFF)), even), constant(16))
    quiet = b.or_(b.lshr(bits, constant(16)), constant(0x40))
    is_nan = b.icmp_unsigned(">", b.and_(bits, constant(0x7FFFFFFF)), constant(0x7F800000))
    return b.select(is_nan, quiet, rounded)


@compiled
def store_activation(_context: Any, product: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`, as this product keeps its activations."""
    kind = product.product

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        _, base, index, value = arguments
        if kind.in_pairs:
            bits = b.trunc(_round_to_bf16(b, value), _I16)
            b.store(bits, b.bitcast(_address(b, base, index, 2), _I16.as_pointer()))
        else:
            if kind.activations == "bf16":
                value = b.bitcast(b.shl(_round_to_bf16(b, value), ir.Constant(_I32, 16)), _F32)
            b.store(value, b.bitcast(_address(b, base, index, 4), _F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(product, types.intp, types.intp, types.float32), generate


@compiled
def store_float(_context: Any, base: Any, index: Any, value: Any) -> Any:
    """Write a float32 as element `index` from the address `base`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, value = arguments
        b.store(value, b.bitcast(_address(b, base, index, 4), _F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), generate


@compiled
def store_pair(_context: Any, base: Any, index: Any, low: Any, high: Any) -> Any:
    """Write two float32 as one word of bf16 bits, `low` in the low half, at word `index` from the address `base`."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        base, index, low, high = arguments
        word = b.or_(_round_to_bf16(b, low), b.shl(_round_to_bf16(b, high), ir.Constant(_I32, 16)))
        b.store(word, b.bitcast(_address(b, base, index, 4), _I32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.float32), generate


@compiled
def dot_tile(
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
    k: Any,
) -> Any:
    """c[r * ldc + m] = sum over k of w[r * ldw + k] * x[m * ldx + k], for r < rows and m < tokens (constants).

    `w` is 2-byte aligned weights, `x` activations of the product's kind, `c` float32. Nothing past k is read.
    """
    R, M, kind = rows.literal_value, tokens.literal_value, product.product
    signature = types.void(product, rows, tokens, *([types.intp] * 7))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, ldw, x, ldx, c, ldc, K = arguments[3:]
        packed = kind.in_pairs
        floats = ir.VectorType(_F32, kind.tier.lanes)
        step = kind.tier.lanes * (2 if packed else 1)
        unroll = max(1, min(4, 8 // (R * M)))
        bits = ir.VectorType(_I16, step)
        wide = ir.VectorType(_I16, step) if packed else ir.VectorType(_I32, step)
        x_width = 2 if packed else 4
        row = [b.add(w, b.mul(ldw, ir.Constant(_I64, 2 * r))) for r in range(R)]
        column = [b.add(x, b.mul(ldx, ir.Constant(_I64, x_width * m))) for m in range(M)]

        def products(k: ir.Value, sums: list[ir.Value], mask: ir.Value | None) -> list[ir.Value]:
            def fetch(base: ir.Value, vector: ir.VectorType, width: int) -> ir.Value:
                pointer = _address(b, base, k, width)
                if mask is None:
                    return _load(b, pointer, vector, width)
                return _masked_load(b, pointer, vector, width, mask)

            xs = [fetch(base, wide, x_width) for base in column]
            xs = [b.bitcast(value, ir.VectorType(_I32, 16) if packed else floats) for value in xs]
            result = []
            for r in range(R):
                weights = fetch(row[r], bits, 2)
                if packed:
                    pairs = b.bitcast(weights, ir.VectorType(_I32, 16))
                    result += [_dot_bf16(b, sums[r * M + m], pairs, xs[m]) for m in range(M)]
                else:
                    values = _widen(b, kind, weights)
                    result += [_multiply_add(b, sums[r * M + m], values, xs[m]) for m in range(M)]
            return result

        def unrolled(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            result: list[ir.Value] = []
            for u in range(unroll):
                at = b.add(k, ir.Constant(_I64, u * step))
                result += products(at, sums[u * R * M : (u + 1) * R * M], None)
            return result

        zero = ir.Constant(_I64, 0)
        whole = b.sub(K, b.srem(K, ir.Constant(_I64, step * unroll)))
        sums = [ir.Constant(floats, [0.0] * kind.tier.lanes)] * (R * M * unroll)
        k, sums = _loop(b, "whole", zero, whole, step * unroll, sums, unrolled)
        for u in range(1, unroll):
            for i in range(R * M):
                sums[i] = b.fadd(sums[i], sums[u * R * M + i])
        _, sums = _loop(
            b,
            "tail",
            k,
            K,
            step,
            sums[: R * M],
            lambda k, sums: products(k, sums, _lane_mask(b, step, b.sub(K, k))),
        )
        for r in range(R):
            for m in range(M):
                at = b.add(b.mul(ldc, ir.Constant(_I64, r)), ir.Constant(_I64, m))
                pointer = b.bitcast(_address(b, c, at, 4), _F32.as_pointer())
                b.store(_horizontal_sum(b, sums[r * M + m]), pointer)
        return context.get_dummy_value()

    return signature, generate


@compiled
def outer_tile(
    _context: Any,
    product: Any,
    rows: Any,
    vectors: Any,
    w: Any,
    ldw: Any,
    x: Any,
    ldx: Any,
    c: Any,
    ldc: Any,
    pairs: Any,
) -> Any:
    """c[r * ldc + t] += sum over p of w[r * ldw + 2 p .. 2 p + 1] . x[p * ldx + t], for r < rows, t < 16 * vectors.

    `x` holds bf16 pairs as uint32 [pairs, ldx]: entry (p, t) is elements 2 p and 2 p + 1 of token t. Only for
    products of bf16 with bf16. Each weight pair is broadcast from its row; there is no horizontal sum.
    """
    R, MV, kind = rows.literal_value, vectors.literal_value, product.product
    signature = types.void(product, rows, vectors, *([types.intp] * 7))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        if not kind.in_pairs:  # a branch that is never taken
            return context.get_dummy_value()
        w, ldw, x, ldx, c, ldc, pairs = arguments[3:]
        floats, words = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
        undefined, splat = ir.Constant(words, ir.Undefined), ir.Constant(words, [0] * 16)
        row = [b.add(w, b.mul(ldw, ir.Constant(_I64, 2 * r))) for r in range(R)]

        def step(p: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            base = b.add(x, b.mul(b.mul(p, ldx), ir.Constant(_I64, 4)))
            xs = [_load(b, _address(b, base, ir.Constant(_I64, 16 * v), 4), words, 4) for v in range(MV)]
            result = []
            for r in range(R):
                pair = _load(b, _address(b, row[r], p, 4), _I32, 2)
                repeated = b.shuffle_vector(b.insert_element(undefined, pair, ir.Constant(_I32, 0)), undefined, splat)
                result += [_dot_bf16(b, sums[r * MV + v], xs[v], repeated) for v in range(MV)]
            return result

        def four_steps(p: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
            for u in range(4):
                sums = step(b.add(p, ir.Constant(_I64, u)), sums)
            return sums

        places = [
            _address(b, c, b.add(b.mul(ldc, ir.Constant(_I64, r)), ir.Constant(_I64, 16 * v)), 4)
            for r in range(R)
            for v in range(MV)
        ]
        before = [_load(b, place, floats, 4) for place in places]
        whole = b.and_(pairs, ir.Constant(_I64, -4))
        p, sums = _loop(b, "fours", ir.Constant(_I64, 0), whole, 4, before, four_steps)
        _, sums = _loop(b, "ones", p, pairs, 1, sums, step)
        for place, total in zip(places, sums, strict=True):
            b.store(total, b.bitcast(place, floats.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate
