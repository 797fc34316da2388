"""Sharing out the rows of a matrix: threads take the next task when they are done with one. Knows no matrices.

Equal shares made beforehand wait for the slowest thread: a core that another program uses for a while, a number of
tasks that the threads do not divide, a thread that also drives a GPU. Results are the same for any number of threads:
what a task computes does not depend on who takes it, nor, where tasks vary in size, a row on the rows beside it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import KernelVariant, amx, bf16_pairs, compiled, k_blocked
from fiddler.kernels.matmul.dot_tiles import SEVERAL

__all__ = ["take_rows", "task_rows"]

_TASKS_A_THREAD = 2  # at least, where the rows allow; with more, many tokens' activations are read from afar more often
_LEAST = 8  # rows of the last tasks, where any number will do


@njit(**OPTIONS)
def task_rows(variant: KernelVariant, tokens: int, rows: int, threads: int) -> int:
    """Weight rows of one task where an expert has at most `tokens`, a multiple of 32.

    With few tokens the memory decides: every task begins to read anew, so these are long, and only the last ones are
    short (`take_rows`). With many, whose activations every task reads again, as many rows as still leave the threads
    enough tasks.
    """
    if amx(variant) and tokens > 2:
        most = 64 if tokens <= 48 else 128
    elif tokens < SEVERAL:
        most = 1024
    else:
        # two panels of pairs that shared 128 rows took 1.2 times as long on Emerald Rapids; floats are no slower so,
        # and Zen, whose pairs go in parts, was not measured
        short = 64 if bf16_pairs(variant) and not k_blocked(variant) else 48
        most = 32 if 16 < tokens <= short else 128
    while most > 32 and rows < most * _TASKS_A_THREAD * threads:
        most //= 2
    return most


@njit(**OPTIONS)
def take_rows(queue: int, most: int, rows: int, threads: int, alike: bool) -> tuple[int, int]:
    """The next task from the address of a queue, an int64: its first row, and how many; no two threads get the same.

    alike: whether a row's sum is the same whatever rows are beside it. Then the last tasks are smaller and smaller, so
    that the threads end together: with one token, a task of 32 rows takes a sixteenth of a small call on 16 threads.
    """
    count = most
    if alike:
        left = rows - _add(queue, 0)
        count = min(most, max(_LEAST, left // (2 * threads) // _LEAST * _LEAST))
    return _add(queue, count), count


@compiled
def _add(_context: Any, counter: Any, amount: Any) -> Any:
    """Add to an int64 at this address, at once for all threads; what it was before."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        word = ir.IntType(64)
        return b.atomic_rmw("add", b.inttoptr(arguments[0], word.as_pointer()), arguments[1], "monotonic")

    return types.intp(types.intp, types.intp), generate
