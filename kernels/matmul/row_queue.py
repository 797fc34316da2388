"""Row queue: threads take the next rows of a matrix when they finish a task. Knows no matrices.

A static split waits for the slowest thread: a core that another program uses for a while, a number of tasks that the
threads do not divide, a thread that also drives a GPU. Results are the same for any number of threads: a task's result
does not depend on its thread, nor, where tasks vary in size, a row's result on the rows beside it.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from fiddler.kernels.codegen.jit import OPTIONS
from fiddler.kernels.codegen.variant import KernelVariant, amx, bf16_pairs, compiled, int8_rows, k_blocked, tuned
from fiddler.kernels.machine.signals import TRIES, pause

__all__ = ["add_rows", "take_rows", "task_rows", "wait_for_rows"]

_compute_bound_tokens, _memory_bound_rows = tuned("compute_bound_tokens"), tuned("memory_bound_task_rows")
_task_rows, _tasks_per_thread, _min_rows = tuned("task_rows"), tuned("tasks_per_thread"), tuned("min_task_rows")
_short_tokens, _short_tokens_whole_rows = tuned("short_task_tokens"), tuned("short_task_tokens_whole_rows")
_amx_row_tokens = tuned("amx_row_tokens")


@njit(**OPTIONS)
def task_rows(variant: KernelVariant, tokens: int, rows: int, threads: int) -> int:
    """Weight rows of one task, a multiple of 32, for at most `tokens` tokens of an expert.

    Few tokens are memory-bound: every task starts a new stream of reads, so tasks are long, and only the last ones are
    short (`take_rows`). Many tokens: every task reads their activations again, so tasks are as long as leaves the
    threads enough of them.
    """
    max_rows: int
    if amx(variant) and tokens > _amx_row_tokens(variant):
        max_rows = _task_rows(variant) // 2 if tokens <= _short_tokens(variant) else _task_rows(variant)
    elif tokens < _compute_bound_tokens(variant):
        max_rows = _memory_bound_rows(variant)
    else:
        whole_rows = bf16_pairs(variant) and not k_blocked(variant)
        short = _short_tokens_whole_rows(variant) if whole_rows else _short_tokens(variant)
        max_rows = 32 if 16 < tokens <= short else _task_rows(variant)
    while max_rows > 32 and rows < max_rows * _tasks_per_thread(variant) * threads:
        max_rows //= 2
    return max_rows


@njit(**OPTIONS)
def take_rows(
    variant: KernelVariant, queue: int, max_rows: int, rows: int, threads: int, independent: bool, hidden: bool
) -> tuple[int, int]:
    """Take the next task of a queue: its first row and number of rows; no two threads get the same rows.

    queue: address of an int64. independent: whether a row's sum is the same whatever rows are beside it. Then the
    last tasks shrink, so that the threads end together: with one token, a task of 32 rows takes a sixteenth of a small
    call on 16 threads. hidden: whether the results become the next product's activations.
    """
    count = max_rows
    if independent:
        rows_left = rows - _fetch_add(queue, 0)
        least = 32 if hidden and int8_rows(variant) else _min_rows(variant)  # 32 hidden rows become int8 with one scale
        count = min(max_rows, max(least, rows_left // (2 * threads) // least * least))
    return _fetch_add(queue, count), count


@njit(**OPTIONS)
def add_rows(counter: int, rows: int) -> None:
    """Count rows whose results are in memory, for `wait_for_rows`. counter: address of an int64."""
    _fetch_add(counter, rows)


@njit(**OPTIONS)
def wait_for_rows(counter: int, rows: int) -> None:
    """Wait until so many rows are counted: those that other threads took and have not ended; at first awake.

    No thread waits for one that has yet to begin, so a layer of threads may run them one after the other.
    """
    tries = 0
    while _counted(counter) < rows:
        tries += 1
        if tries < TRIES:
            pause()
        else:
            _sched_yield()


_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@compiled
def _counted(_context: Any, counter: Any) -> Any:
    """The int64 at this address; what was written before it is seen after it."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.load_atomic(b.inttoptr(arguments[0], ir.IntType(64).as_pointer()), "acquire", 8)

    return types.intp(types.intp), generate


@compiled
def _fetch_add(_context: Any, counter: Any, amount: Any) -> Any:
    """Add atomically to the int64 at this address, after all that was written before; returns its previous value."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        word = ir.IntType(64)
        return b.atomic_rmw("add", b.inttoptr(arguments[0], word.as_pointer()), arguments[1], "acq_rel")

    return types.intp(types.intp, types.intp), generate
