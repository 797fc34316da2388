"""The inner loop for many tokens with int8 activations: rows of int8 weights and 16 or more packed tokens.

A vector holds four elements of each of 16 tokens, unsigned: the int8 plus 128. Its products with four weights of a row
are added as integers (`vpdpbusd`), starting from -128 times the sum of the weights. The integers of a group are scaled
in float32. Knows pointers and strides only.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import F32, I32, I64, address, load, loop, multiply_add, opaque, splat
from fiddler.kernels.codegen.variant import KernelVariant, compiled
from fiddler.kernels.formats import BLOCK_FORMATS
from fiddler.kernels.formats.block_format import GROUP
from fiddler.kernels.matmul.int8_activations import GROUP_WORDS
from fiddler.kernels.matmul.int8_weights import stride_of

__all__ = ["int8_tile", "tile_rows"]

_LANES = 16
_ROWS = {16: 8, 32: 4, 48: 4}


def tile_rows(tokens: int) -> int:
    """Weight rows of a tile of so many tokens: their sums fill the vector registers."""
    return _ROWS[tokens]


@compiled
def int8_tile(
    _context: Any, variant: Any, rows: Any, tokens: Any, w: Any, x: Any, ldx: Any, c: Any, ldc: Any, groups: Any
) -> Any:
    """c[r * ldc + t] += sum over 32 * `groups` elements of w[r] . x[t], for t < tokens (a constant: 16, 32 or 48).

    `rows`: "several" (`tile_rows`) or "one". `w`: rows as `int8_weights` has them. `x`: a panel of the packed layout,
    `ldx` tokens wide (see `int8_activations`).
    """
    kind: KernelVariant = variant.variant
    R = tile_rows(tokens.literal_value) if rows.literal_value == "several" else 1
    signature = types.void(variant, rows, tokens, *([types.intp] * 6))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        w, x, ldx, c, ldc, groups = arguments[3:]
        if rows.literal_value == "several":
            ldx = ir.Constant(I64, tokens.literal_value)  # such a panel alone is handed in
        tile = _Tile(b, kind, R, tokens.literal_value // _LANES, w, x, ldx)
        zeros = [ir.Constant(_FLOATS, [0.0] * _LANES)] * (tile.rows * tile.vectors)
        _, sums = loop(b, "groups", ir.Constant(I64, 0), groups, 1, zeros, tile.add_group)
        for n, total in enumerate(sums):
            r, v = divmod(n, tile.vectors)
            pointer = address(b, c, b.add(b.mul(ldc, ir.Constant(I64, r)), ir.Constant(I64, _LANES * v)), 4)
            b.store(b.fadd(load(b, pointer, _FLOATS, 4), total), b.bitcast(pointer, _FLOATS.as_pointer())).align = 4
        return context.get_dummy_value()

    return signature, generate


_FLOATS, _WORDS = ir.VectorType(F32, _LANES), ir.VectorType(I32, _LANES)


class _Tile:
    """Some rows times some vectors of tokens: generates the products of one group of 32 elements after the other."""

    def __init__(
        self, b: ir.IRBuilder, kind: KernelVariant, rows: int, vectors: int, w: ir.Value, x: ir.Value, ldx: ir.Value
    ) -> None:
        self.b, self.rows, self.vectors, self.w, self.x, self.ldx = b, rows, vectors, w, x, ldx
        self.blocks = BLOCK_FORMATS[kind.weights]
        self.halves = GROUP // self.blocks.scale_length  # scales of a group: one, or one for each half
        self.weights, self.stride = kind.tuning.decoded_k, 4 * stride_of(kind)

    def add_group(self, i: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of group i."""
        b, vectors = self.b, range(self.vectors)
        x = b.add(self.x, b.mul(b.mul(i, self.ldx), ir.Constant(I64, 4 * GROUP_WORDS)))
        # the sums of both halves of these rows in registers, beside those of all
        result, step = list(sums), self.rows if self.halves == 1 or self.vectors < 3 else max(1, self.rows // 2)
        for first in range(0, self.rows, step):
            rows = range(first, min(first + step, self.rows))
            if first > 0:
                x = opaque(b, x)  # loads them again: there are no registers for all
            scaled = self._scaled(i, rows, self._products(i, x, rows))
            if self.blocks.has_minimum:
                scaled = self._less_minimums(i, x, rows, scaled)
            scales = [self._activations(x, GROUP // 4, v, _FLOATS) for v in vectors]
            for r in rows:
                for v in vectors:
                    n = r * self.vectors + v
                    result[n] = multiply_add(b, result[n], scaled[r, v], scales[v])
        return result

    def _products(self, i: ir.Value, x: ir.Value, rows: range) -> dict[tuple[int, int, int], ir.Value]:
        """The integer products of each half (or of the whole), row and vector."""
        b, words, vectors = self.b, GROUP // 4 // self.halves, range(self.vectors)
        function = ir.FunctionType(_WORDS, [_WORDS] * 3)
        dot = cgutils.get_or_insert_function(b.module, function, "llvm.x86.avx512.vpdpbusd.512")
        sums: dict[tuple[int, int, int], ir.Value] = {}
        for half in range(self.halves):
            for r in rows:
                start = splat(b, self._scalar(i, r, 0, half, I32), _LANES)
                sums |= {(half, r, v): start for v in vectors}
        for half in range(self.halves):
            for p in range(words * half, words * half + words):
                xs = [self._activations(x, p, v, _WORDS) for v in vectors]
                for r in rows:
                    at = b.add(b.mul(i, ir.Constant(I64, GROUP)), ir.Constant(I64, r * self.stride + 4 * p))
                    repeated = splat(b, load(b, address(b, self.w, at, 1), I32, 4), _LANES)
                    for v in vectors:
                        sums[half, r, v] = b.call(dot, [sums[half, r, v], xs[v], repeated])
        return sums

    def _scaled(
        self, i: ir.Value, rows: range, products: dict[tuple[int, int, int], ir.Value]
    ) -> dict[tuple[int, int], ir.Value]:
        """The products of a group, each half times its scale."""
        b, result = self.b, dict[tuple[int, int], ir.Value]()
        for half in range(self.halves):
            for r in rows:
                scale = splat(b, self._scalar(i, r, 1, half, F32), _LANES)
                for v in range(self.vectors):
                    number = b.sitofp(products[half, r, v], _FLOATS)
                    result[r, v] = (
                        multiply_add(b, result[r, v], number, scale) if half else b.fmul(number, scale, flags=("arcp",))
                    )
        return result

    def _less_minimums(
        self, i: ir.Value, x: ir.Value, rows: range, scaled: dict[tuple[int, int], ir.Value]
    ) -> dict[tuple[int, int], ir.Value]:
        """Less each minimum times the sum of its activations."""
        b, result = self.b, dict(scaled)
        for v in range(self.vectors):
            sums = [self._activations(x, GROUP // 4 + 1 + half, v, _FLOATS) for half in range(2)]
            if self.halves == 1:
                sums = [b.fadd(*sums)]
            for half, total in enumerate(sums):
                for r in rows:
                    minimum = splat(b, self._scalar(i, r, 2, half, F32), _LANES)
                    result[r, v] = multiply_add(b, result[r, v], total, minimum)
        return result

    def _activations(self, x: ir.Value, word: int, v: int, vector: ir.Type) -> ir.Value:
        """Vector v of a word of the group's activations."""
        at = self.b.mul(self.ldx, ir.Constant(I64, word))
        return load(self.b, address(self.b, x, self.b.add(at, ir.Constant(I64, _LANES * v)), 4), vector, 4)

    def _scalar(self, i: ir.Value, r: int, part: int, half: int, element: ir.Type) -> ir.Value:
        """A row's start of a sum (part 0), scale (1) or minimum (2), of a half of group i."""
        b = self.b
        begin = r * self.stride + self.weights + part * (self.weights // 16 * 4) + 4 * half
        at = b.add(b.mul(i, ir.Constant(I64, 4 * self.halves)), ir.Constant(I64, begin))
        return load(b, address(b, self.w, at, 1), element, 4)
