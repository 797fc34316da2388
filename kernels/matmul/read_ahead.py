"""Where the weights lie that a loop over rows reads some bytes later, to prefetch them. Knows rows and strides only."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from fiddler.kernels.codegen.llvm import I64

__all__ = ["ReadAhead", "read_ahead"]

_MOST_ROWS = 8  # ahead: each lies in a page of its own, and with 24 of them Q4_K reads at 0.7 of the speed (Zen 5)


class ReadAhead(NamedTuple):
    """Distances in bytes, int64."""

    border: ir.Value
    """In front of so many bytes of a row, the weights read later lie `near`; from there on, `beyond`."""
    near: ir.Value
    beyond: ir.Value

    def at(self, b: ir.IRBuilder, place: ir.Value) -> ir.Value:
        """The distance from a place, the bytes of its row before it."""
        return b.select(b.icmp_signed("<", place, self.border), self.near, self.beyond)


def read_ahead(b: ir.IRBuilder, distance: ir.Value, read: ir.Value, apart: ir.Value) -> ReadAhead:
    """Where the weights lie that are read `distance` bytes later, not counting what is skipped; at most 8 rows on.

    read: the first bytes of each row that are read; the next row begins `apart` bytes after it, or later ones do where
    several rows are read side by side. Rows are longer than `read` where another device has the rest of an expert.
    """
    read = b.select(b.icmp_signed(">", read, ir.Constant(I64, 0)), read, ir.Constant(I64, 1))
    rows_on, in_row = b.sdiv(distance, read), b.srem(distance, read)
    most = ir.Constant(I64, _MOST_ROWS)
    near = b.add(b.mul(b.select(b.icmp_signed("<", rows_on, most), rows_on, most), apart), in_row)
    return ReadAhead(b.sub(read, in_row), near, b.add(near, b.sub(apart, read)))
