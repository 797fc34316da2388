"""Grouped matrix products: all groups of tokens with their experts' rows. Knows addresses.

The only kernel that reads weights. A product has one of two epilogues: with two matrices, gate and up, SwiGLU, stored
as the next product's activations; with one matrix, the weighted sum over each token's groups. One kernel has both, and
packs activations in the same parallel loop, because compiling products and such loops takes seconds.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from numba import prange, typeof, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import Workspace
from fiddler.kernels.matmul.blocks import call_block_product, scratch_words
from fiddler.kernels.matmul.epilogues import (
    CLAMPED,
    PLAIN,
    add_bias,
    add_weighted,
    clamped_swiglu,
    store_hidden,
    swiglu,
)
from fiddler.kernels.matmul.group_rows import next_offset, prefetch_rows, queue_offsets, rows_in
from fiddler.kernels.matmul.packing import GROUPS, Groups, call_pack, group_offsets, group_tokens, pack, row_stride
from fiddler.kernels.matmul.row_queue import add_rows, take_rows, task_rows, wait_for_rows

__all__ = [
    "ARGUMENTS",
    "addresses",
    "compile_grouped_products",
    "grouped_products",
    "products",
    "run",
    "workspace",
]


@partial(kernel, parallel=False)
def _take_tasks(
    variant: KernelVariant,
    gate_up: int,
    matrices: np.ndarray,
    biases: np.ndarray,
    stored: np.ndarray,
    groups: Groups,
    row_at: np.ndarray,
    words: int,
    at: np.ndarray,
    hidden_at: np.ndarray,
    expert_width: int,
    outputs: int,
    width: int,
    task: int,
    queue: int,
    stored_rows: int,
    awaited: int,
    independent: bool,
    threads: int,
    c: np.ndarray,
    scratch: int,
    result: np.ndarray,
) -> None:
    """One thread's tasks of the products with one matrix, or, for gate and up, with two.

    The names are those of `grouped_products`. gate_up: the activation, PLAIN for one matrix; matrices, biases, stored:
    from this one on, each [outputs, width]; row_at: see `rows_in`; at: offsets of the groups' activations; outputs:
    rows of the queue; stored_rows: address of an int64, increased by those whose hidden activations are stored;
    awaited: of which so many must be before this product, or 0; c: float32 [1 or 2, task, ldc], this thread's sums;
    result: [T, outputs], or empty where the output is hidden activations.
    """
    first, stride, pair, ldc = groups.first, row_stride(variant, width), 2 if gate_up != PLAIN else 1, c.shape[2]
    begin, row_count = take_rows(variant, queue, task, outputs, threads, independent, gate_up != PLAIN)
    if awaited > 0:
        prefetch_rows(matrices, stored, groups, width, begin, min(begin + row_count, outputs))
        wait_for_rows(stored_rows, awaited)
    while begin < outputs:
        row_count = min(row_count, outputs - begin)
        for t in range(result.shape[0]):
            for r in range(begin, begin + row_count):
                result[t, r] = 0
        for g in range(groups.expert.size):
            count, packed, hidden_rows = first[g + 1] - first[g], groups.packed[g], groups.hidden[g]
            own, rows, k = begin, row_count, hidden_rows
            if gate_up != PLAIN:
                own, rows = rows_in(groups, row_at, g, begin, row_count)
                k = width
                if rows <= 0:
                    continue
            expert = groups.expert[g]
            for i in range(pair):
                row_bytes, multiply = stored[i]
                following = next_offset(matrices, stored, gate_up != PLAIN, i, groups, row_at, g, begin, row_count)
                w, x = matrices[i, expert] + own * row_bytes, words + 4 * at[g]
                c_at = c.ctypes.data + 4 * i * task * ldc
                call_block_product(
                    multiply,
                    (variant, packed, w, width, rows, x, stride, count, k, c_at, ldc, following, scratch),
                )
            columns = (count + 15) // 16 * 16 if packed else count
            if biases.shape[1] > 0:
                for i in range(pair):
                    add_bias(c[i], rows, columns, biases[i, expert] + 4 * own)
            if gate_up != PLAIN:
                if gate_up == CLAMPED:
                    clamped_swiglu(c[0], c[1], rows, columns)
                else:
                    swiglu(c[0], c[1], rows, columns)
                h, next_stride = words + 4 * hidden_at[g], row_stride(variant, expert_width)
                store_hidden(variant, packed, c[0], own, rows, count, h, hidden_rows, expert_width, next_stride)
            else:
                token, group_weights = (
                    groups.token[first[g] : first[g + 1]],
                    groups.routing_weights[first[g] : first[g + 1]],
                )
                add_weighted(c[0], rows, token, group_weights, result, begin)
        if gate_up != PLAIN:
            add_rows(stored_rows, row_count)
        begin, row_count = take_rows(variant, queue, task, outputs, threads, independent, gate_up != PLAIN)


_INTS, _FLOATS, _INT, _ADDRESSES = types.intp[::1], types.float32[::1], types.intp, types.intp[:, ::1]
_tasks = FunctionPointer(
    _take_tasks,
    *(None, _INT, _ADDRESSES, _ADDRESSES, types.int64[:, ::1], GROUPS, _INTS, _INT, _INTS, _INTS, *[_INT] * 7),
    *(types.boolean, _INT),
    *(types.float32[:, :, ::1], _INT, types.float32[:, ::1]),
)
_call_tasks = _tasks.call


@lru_cache(maxsize=64)
def addresses(variant: KernelVariant) -> tuple[int, int]:
    """The addresses of the kernels that `grouped_products` calls; compiled or read from the cache first.

    variant: a `KernelVariant.grouping`, as of all functions here.
    """
    kind = typeof(variant)
    return pack.address(kind), _tasks.address(kind)


def run(
    variant: KernelVariant,
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    hidden: np.ndarray,
    matrices: np.ndarray,
    stored: np.ndarray,
    outputs: np.ndarray,
    activation: int,
    y: np.ndarray,
    multiplications: int,
    biases: np.ndarray | None = None,
) -> bool:
    """Call `grouped_products` on the threads that `multiplications` justify; False if an expert id is out of range."""
    x, biases = np.ascontiguousarray(x), _NO_BIASES if biases is None else biases
    with threads_for(multiplications) as threads:
        arguments = variant, x, expert_ids, routing_weights, hidden, matrices, stored, outputs, activation, y, biases
        needed_words: int = grouped_products(*arguments, workspace.words, threads, addresses(variant))
        if needed_words > 0:
            needed_words = grouped_products(*arguments, workspace.grow(needed_words), threads, addresses(variant))
    assert needed_words <= 0
    return needed_words == 0


def compile_grouped_products(variant: KernelVariant) -> None:
    """Compile `grouped_products`, or read it from the cache; computes nothing."""
    x, expert_ids, routing_weights = np.zeros((1, 2), np.float32), np.full((1, 1), -1), np.ones((1, 1), np.float32)
    one, y = np.ones(1, np.int64), x.reshape(-1)
    stored = np.ones((1, 2), np.int64)
    needed_words = grouped_products(
        *(variant, x, expert_ids, routing_weights, one, one[None], stored, one, PLAIN, y, _NO_BIASES),
        *(workspace.words, 1, (0, 0)),
    )
    assert needed_words == -1


workspace = Workspace()
_NO_BIASES = np.empty((3, 0), np.int64)


@kernel
def grouped_products(
    variant: KernelVariant,
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    hidden: np.ndarray,
    matrices: np.ndarray,
    stored: np.ndarray,
    outputs: np.ndarray,
    activation: int,
    y: np.ndarray,
    biases: np.ndarray,
    memory: np.ndarray,
    threads: int,
    addresses: tuple[int, int],
) -> int:
    """Products of each token's experts with its x [T, K], for matrices [outputs, K] at addresses [matrices, E].

    stored: `stored_as` of each matrix, int64 [matrices, 2]. biases: addresses of float32 vectors [outputs], added to
    the product of each matrix, [matrices, E]; no columns: none.

    With an activation, three matrices: y [T, outputs[2]] = sum over j of routing_weights[t, j] * third . (silu(first .
    x) * (second . x)), of expert_ids[t, j], over the first `hidden` [E] hidden rows of each expert; other activations:
    see `epilogues`. A bias of the third is added unless `hidden` is 0. Without (PLAIN), for every matrix, one after the
    other, y [T, outputs] = sum over j of routing_weights[t, j] * matrix . x[t], over the first `hidden` elements. `y`
    is flat. Returns 0, or, without computing, the words that the workspace `memory` needs, or -1 if an expert id is out
    of the range of `hidden`. `threads` threads share the weight rows. addresses: `addresses(variant)`.
    """
    (tokens, width), gated = x.shape, activation != PLAIN
    for t in range(tokens):
        for j in range(expert_ids.shape[1]):
            if not 0 <= expert_ids[t, j] < hidden.size:
                return -1
    expert_width = outputs[0] if gated else 0
    # constructed here: Numba passes a named tuple to the threads only where it sees its class
    groups = Groups(
        *group_tokens(variant, expert_ids, routing_weights, hidden, width % 2 == 0 and expert_width % 2 == 0)
    )
    first = groups.first
    max_tokens, independent = np.int64(0), True
    for g in range(groups.expert.size):
        max_tokens, independent = max(max_tokens, first[g + 1] - first[g]), independent and not groups.packed[g]
    # a row of sums is a vector longer than needed: rows a power of two apart would compete for the same cache sets
    ldc = (max_tokens + 15) // 16 * 16 + 16
    row_at, queued, tasks = queue_offsets(groups, gated and independent), outputs.copy(), outputs.copy()
    if gated and independent:
        queued[0] = row_at[-1]
    thread_words, max_task = np.int64(0), np.int64(0)  # of one thread's sums
    for i in range(outputs.size):
        tasks[i] = task_rows(variant, max_tokens, queued[i], threads)
        max_task = max(max_task, tasks[i])
        thread_words = max(thread_words, (2 if gated and i == 0 else 1) * tasks[i] * ldc)
    thread_words = (thread_words + 15) // 16 * 16
    scratch = (scratch_words(variant, max_task) + 15) // 16 * 16
    x_at = group_offsets(variant, groups, width, threads * (thread_words + scratch))
    hidden_at = group_offsets(variant, groups, expert_width, x_at[-1])
    needed_words: int = hidden_at[-1]
    if memory.size < needed_words:
        return needed_words
    words, (pack_columns, take_tasks) = memory.ctypes.data, addresses
    scratch_at = words + 4 * threads * thread_words
    queues = np.zeros(8 * (outputs.size + 1), np.int64)  # a cache line each; the last: hidden rows that are stored
    stored_rows = queues.ctypes.data + 64 * outputs.size
    if tokens == 1:  # a parallel loop takes several times as long as packing one
        call_pack(pack_columns, (variant, x, groups, words, x_at, 0, 1))
    for packing in range(1 if tokens > 1 else 0, -1, -1):
        for thread in prange(threads):
            if packing:
                call_pack(pack_columns, (variant, x, groups, words, x_at, thread, threads))
                continue
            done = 0  # elements of y
            for stage in range(2 if gated else outputs.size):
                gate_up, down = activation if stage == 0 else PLAIN, gated and stage == 1
                matrix, awaited = (2, queued[0]) if down else (stage, 0)
                task, queue = tasks[matrix], queues.ctypes.data + 64 * matrix
                stage_k, at = (expert_width, hidden_at) if down else (width, x_at)
                pair, result_tokens = 2 if gate_up != PLAIN else 1, 0 if gate_up != PLAIN else tokens
                result = y[done : done + result_tokens * queued[matrix]].reshape(result_tokens, queued[matrix])
                done += result.size
                sums = memory[thread * thread_words : thread * thread_words + pair * task * ldc]
                _call_tasks(
                    take_tasks,
                    (
                        *(variant, gate_up, matrices[matrix:], biases[matrix:], stored[matrix:], groups),
                        *(row_at, words, at, hidden_at),
                        *(
                            expert_width,
                            queued[matrix],
                            stage_k,
                            task,
                            queue,
                            stored_rows,
                            awaited,
                            independent,
                            threads,
                        ),
                        *(sums.reshape(pair, task, ldc), scratch_at + 4 * thread * scratch, result),
                    ),
                )
    return 0


_MATRIX = types.float32[:, ::1]
ARGUMENTS = (
    *(_MATRIX, types.int64[:, ::1], _MATRIX, _INTS, _ADDRESSES, types.int64[:, ::1], _INTS, _INT),
    *(_FLOATS, _ADDRESSES, _FLOATS, _INT, types.UniTuple(_INT, 2)),
)  # of `grouped_products` from `x` on
products = FunctionPointer(grouped_products, None, *ARGUMENTS, returns=_INT)
