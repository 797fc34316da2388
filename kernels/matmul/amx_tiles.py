"""The inner loop on AMX: a matrix product held in the CPU's tile registers (`tdpbf16ps`). Knows pointers and strides.

A tile register holds 16 rows of 64 bytes. A weights' tile is 16 rows x 32 elements, loaded by the matrix's own row
stride; an activations' tile is 16 pairs x 16 tokens of a packed panel; their product is 16 rows x 16 tokens of
float32. The tile shapes are per-thread state: `configure_tiles` before, `release_tiles` after.

Instructions and their layout: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from fiddler.kernels.codegen.llvm import I8, I64, address, prefetch
from fiddler.kernels.codegen.variant import compiled

__all__ = ["TILE_PAIRS", "TILE_ROWS", "configure_tiles", "matrix_tile", "release_tiles"]

TILE_PAIRS = 16
"""bf16 pairs along K of one step; `matrix_tile` takes a multiple of it."""

TILE_ROWS = 32
"""Weight rows of `matrix_tile`."""

_LEVEL_2 = 2

# palette 1, then for each of eight registers 64 bytes a row and 16 rows
_SHAPES = bytes([1] + [0] * 15) + (64).to_bytes(2, "little") * 8 + bytes(16) + bytes([16] * 8 + [0] * 8)


def _call(b: ir.IRBuilder, name: str, *arguments: ir.Value) -> None:
    kinds = [argument.type for argument in arguments]
    b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), kinds), name), arguments)


@compiled
def configure_tiles(_context: Any, variant: Any) -> Any:
    """Set the shape of every tile register of this thread."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, _arguments: list[ir.Value]) -> ir.Value:
        if variant.variant.amx:
            shapes = ir.Constant(ir.ArrayType(I8, len(_SHAPES)), bytearray(_SHAPES))
            pointer = b.bitcast(cgutils.global_constant(b.module, "tile_shapes", shapes), I8.as_pointer())
            _call(b, "llvm.x86.ldtilecfg", pointer)
        return context.get_dummy_value()

    return types.void(variant), generate


@compiled
def release_tiles(_context: Any, variant: Any) -> Any:
    """Release this thread's tile registers, so that a context switch need not save them."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, _arguments: list[ir.Value]) -> ir.Value:
        if variant.variant.amx:
            _call(b, "llvm.x86.tilerelease")
        return context.get_dummy_value()

    return types.void(variant), generate


@compiled
def matrix_tile(
    _context: Any,
    variant: Any,
    tokens: Any,
    prefetch_rows: Any,
    w: Any,
    ldw: Any,
    x: Any,
    ldx: Any,
    c: Any,
    ldc: Any,
    pairs: Any,
    prefetch_at: Any,
    ld_prefetch: Any,
) -> Any:
    """c[r * ldc + t] += sum over p of w[r * ldw + p] . x[p * ldx + t], for r < 32 and t < tokens (16 or 32).

    Words of 4 bytes as in `outer_tiles.outer_tile`; `pairs` is a positive multiple of TILE_PAIRS. Prefetches as many
    words of each of `prefetch_rows` other rows, from the address `prefetch_at` on, `ld_prefetch` words apart.
    `tokens` and `prefetch_rows` are literals; the latter is "none", "all" (32) or "part" (the tuning's).
    A tile's row that crosses a cache line is loaded at a fifth of the speed.
    """
    columns, kind = tokens.literal_value // 16, variant.variant
    prefetched = {"none": 0, "all": TILE_ROWS, "part": kind.tuning.amx_prefetch_rows}[prefetch_rows.literal_value]
    signature = types.void(variant, tokens, prefetch_rows, *([types.intp] * 9))

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        if not kind.amx:  # in a branch that this variant never takes
            return context.get_dummy_value()
        w, ldw, x, ldx, c, ldc, pairs, prefetch_at, ld_prefetch = arguments[3:]
        w_row, x_row, c_row, prefetch_row = (
            b.mul(stride, ir.Constant(I64, 4)) for stride in (ldw, ldx, ldc, ld_prefetch)
        )
        sums = [[ir.Constant(I8, 2 * r + m) for m in range(columns)] for r in range(2)]
        weights = [ir.Constant(I8, 4 + r) for r in range(2)]
        activations = [ir.Constant(I8, 6 + m) for m in range(columns)]

        def at(base: ir.Value, stride: ir.Value, rows: int, offset: int) -> ir.Value:
            return address(b, b.add(base, b.mul(stride, ir.Constant(I64, rows))), ir.Constant(I64, offset), 1)

        c_pointers = [[at(c, c_row, 16 * r, 64 * m) for m in range(columns)] for r in range(2)]
        for r in range(2):
            for m in range(columns):
                _call(b, "llvm.x86.tileloadd64", sums[r][m], c_pointers[r][m], c_row)
        before, inside, after = b.block, b.append_basic_block("tiles.body"), b.append_basic_block("tiles.after")
        b.branch(inside)
        b.position_at_end(inside)
        p, w_at, x_at = (b.phi(I64) for _ in range(3))
        for phi, value in ((p, ir.Constant(I64, 0)), (w_at, w), (x_at, x)):
            phi.add_incoming(value, before)
        for r in range(2):  # each product right after the loads of its operands
            _call(b, "llvm.x86.tileloadd64", weights[r], at(w_at, w_row, 16 * r, 0), w_row)
            for m in range(columns):
                if r == 0:
                    _call(b, "llvm.x86.tileloadd64", activations[m], at(x_at, x_row, 0, 64 * m), x_row)
                _call(b, "llvm.x86.tdpbf16ps", sums[r][m], weights[r], activations[m])
        for r in range(prefetched):
            prefetch(b, at(b.add(prefetch_at, b.sub(w_at, w)), prefetch_row, r, 0), _LEVEL_2)
        next_p = b.add(p, ir.Constant(I64, TILE_PAIRS))
        p.add_incoming(next_p, b.block)
        w_at.add_incoming(b.add(w_at, ir.Constant(I64, 4 * TILE_PAIRS)), b.block)
        x_at.add_incoming(b.add(x_at, b.mul(x_row, ir.Constant(I64, TILE_PAIRS))), b.block)
        b.cbranch(b.icmp_signed("<", next_p, pairs), inside, after)
        b.position_at_end(after)
        for r in range(2):
            for m in range(columns):
                _call(b, "llvm.x86.tilestored64", sums[r][m], c_pointers[r][m], c_row)
        return context.get_dummy_value()

    return signature, generate
