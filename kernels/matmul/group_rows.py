"""Which rows of each group a task of gate and up has, and where the rows lie that are read next. Knows no products."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.llvm import I8, prefetch
from fiddler.kernels.codegen.variant import compiled
from fiddler.kernels.matmul.packing import Groups

__all__ = ["next_offset", "prefetch_rows", "queue_offsets", "rows_in"]

_LINE, _PREFETCHED = 64, 1 << 15  # bytes
_STEP = 32  # a group's rows begin at a multiple in the queue, so that tasks begin at whole groups of int8 activations


@njit(**OPTIONS)
def queue_offsets(groups: Groups, apart: bool) -> np.ndarray:
    """Where in the queue each group's rows begin, and where the last one's end: int64 [G + 1].

    apart: the groups' hidden rows lie in the queue one after the other, so the last tasks are some rows of one expert,
    and an expert of which the CPU computes a part is as long as that part. Else all begin at 0: a task has the same
    rows of every group.
    """
    at = np.zeros(groups.expert.size + 1, np.int64)
    if apart:
        for g in range(groups.expert.size):
            at[g + 1] = at[g] + (groups.hidden[g] + _STEP - 1) // _STEP * _STEP
    return at


@njit(**OPTIONS)
def rows_in(groups: Groups, row_at: np.ndarray, g: int, begin: int, count: int) -> tuple[int, int]:
    """The first hidden row of group g in the queue's rows [begin, begin + count), and how many there are, 0 or less.

    row_at: see `queue_offsets`.
    """
    first = max(begin - row_at[g], 0)
    return first, min(begin + count - row_at[g], groups.hidden[g]) - first


@njit(**OPTIONS)
def prefetch_rows(matrices: np.ndarray, stored: np.ndarray, groups: Groups, width: int, begin: int, end: int) -> None:
    """Prefetch what a task reads first of `down`, rows [begin, end): while it waits for hidden activations.

    matrices, stored: see `grouped_products`, from `down` on. width: hidden rows of a whole expert.
    """
    left = _PREFETCHED
    for row in range(begin, end):
        for g in range(groups.expert.size):
            nbytes = stored[0, 0] * groups.hidden[g] // width
            address = matrices[0, groups.expert[g]] + row * stored[0, 0]
            for at in range(address, address + nbytes, _LINE):
                _prefetch(at)
            left -= nbytes
            if left <= 0:
                return


@compiled
def _prefetch(_context: Any, _address: Any) -> Any:
    """Prefetch the cache line at an address into the second-level cache."""

    def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        prefetch(b, b.inttoptr(arguments[0], I8.as_pointer()), 2)
        return context.get_dummy_value()

    return types.none(types.intp), generate


@njit(**OPTIONS)
def next_offset(
    matrices: np.ndarray,
    stored: np.ndarray,
    gated: bool,
    i: int,
    groups: Groups,
    row_at: np.ndarray,
    g: int,
    begin: int,
    count: int,
) -> int:
    """Bytes from group g's rows in matrix i to those that the task reads next, 0 if it is the last.

    These are in the other matrix, of two, or of the next group that has rows in the task. matrices, stored: see
    `grouped_products`; gated: two matrices, of which the queue's rows [begin, begin + count) are read; else one.
    """
    expert = groups.expert[g]
    own = rows_in(groups, row_at, g, begin, count)[0] if gated else begin
    here = matrices[i, expert] + own * stored[i, 0]
    if gated and i == 0:
        return int(matrices[1, expert] + own * stored[1, 0] - here)
    for following in range(g + 1, groups.expert.size):
        first, rows = rows_in(groups, row_at, following, begin, count) if gated else (begin, groups.hidden[following])
        if rows > 0:
            return int(matrices[0, groups.expert[following]] + first * stored[0, 0] - here)
    return 0
