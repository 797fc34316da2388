"""The one kernel that reads weights: products of all groups of tokens with their experts' rows, and what follows.

Two things may follow a product: with two matrices, gate and up, SiLU of the one times the other, stored as the next
product's activations; with one matrix, the sum over each token's groups, weighted. Both are in one kernel, since to
compile the products is what takes the time. Before them all activations are packed; that is a stage of the same
parallel loop, since each such loop takes more than a second to compile.
"""

from __future__ import annotations

from functools import lru_cache, partial

import numpy as np
from numba import njit, prange, typeof, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import FASTMATH, OPTIONS, kernel
from fiddler.kernels.codegen.scalar_math import silu
from fiddler.kernels.codegen.variant import KernelVariant, bf16_pairs, panel_tokens
from fiddler.kernels.machine.threads import threads_for
from fiddler.kernels.machine.workspace import Workspace
from fiddler.kernels.matmul.blocks import block_product, call_block_product, scratch_words
from fiddler.kernels.matmul.packing import GROUPS, Groups, call_pack, group_tokens, pack, places, row_stride
from fiddler.kernels.matmul.row_queue import take_rows, task_rows
from fiddler.kernels.matmul.stores import store_activation, store_pairs, store_word

__all__ = ["addresses", "compile_grouped_products", "grouped_products", "products", "run", "workspace"]


@njit(**OPTIONS, fastmath=FASTMATH)
def _gate(a: np.ndarray, b: np.ndarray, rows: int, used: int) -> None:
    """a = silu(a) * b: nothing but arithmetic on arrays, so that it becomes vector code."""
    for r in range(rows):
        for m in range(used):
            a[r, m] = silu(a[r, m]) * b[r, m]


@njit(**OPTIONS)
def _store_hidden(
    variant: KernelVariant,
    packed: bool,
    a: np.ndarray,
    begin: int,
    rows: int,
    tokens: int,
    h: int,
    hidden: int,
    stride: int,
) -> None:
    """Write rows [begin, begin + rows) of the hidden activations, a [rows, tokens], at address h in its layout."""
    if not packed:
        for m in range(tokens):
            for r in range(rows):
                store_activation(variant, h, m * stride + begin + r, a[r, m])
        return
    panel_width = panel_tokens(variant)
    padded = (tokens + 15) // 16 * 16
    for panel in range(0, padded, panel_width):
        wide = min(panel_width, padded - panel)
        if bf16_pairs(variant):
            for r in range(0, rows, 2):
                word, low = panel * (hidden // 2) + (begin + r) // 2 * wide - panel, a.ctypes.data + 4 * r * a.shape[1]
                for m in range(panel, panel + wide, 16):
                    store_pairs(h, word + m, low + 4 * m, low + 4 * (m + a.shape[1]))
        else:
            for r in range(rows):
                word = panel * hidden + (begin + r) * wide - panel
                for m in range(panel, panel + wide):
                    store_word(variant, h, word + m, a[r, m])


@njit(**OPTIONS, fastmath=FASTMATH)
def _add(c: np.ndarray, rows: int, token: np.ndarray, routing_weights: np.ndarray, y: np.ndarray, begin: int) -> None:
    """y[token, begin + r] += share * c[r, m], in squares, so that both sides stay in the first-level cache."""
    for first in range(0, token.size, 16):
        last = min(first + 16, token.size)
        for top in range(0, rows, 16):
            bottom = min(top + 16, rows)
            for m in range(first, last):
                t, weight = token[m], routing_weights[m]
                for r in range(top, bottom):
                    y[t, begin + r] += weight * c[r, m]


@njit(**OPTIONS)
def _onward(matrices: np.ndarray, pair: int, i: int, groups: Groups, g: int, begin: int, expert: int) -> int:
    """Bytes from the rows of group g's expert in matrix i of these to the rows that a task reads next, 0 if none.

    That is in the other matrix of the pair, or of the next group with hidden rows from `begin` on. expert: its bytes.
    """
    if i + 1 < pair:
        return int(matrices[i + 1] - matrices[i])
    for following in range(g + 1, groups.expert.size):
        if groups.hidden[following] > begin:
            return int(matrices[0] - matrices[i] + (groups.expert[following] - groups.expert[g]) * expert)
    return 0


@partial(kernel, parallel=False)
def _take_tasks(
    variant: KernelVariant,
    multiply: int,
    opens: bool,
    matrices: np.ndarray,
    groups: Groups,
    words: int,
    at: np.ndarray,
    hidden_at: np.ndarray,
    between: int,
    outputs: int,
    width: int,
    task: int,
    queue: int,
    alike: bool,
    threads: int,
    c: np.ndarray,
    scratch: int,
    result: np.ndarray,
) -> None:
    """What one thread does of the products with one matrix, or, where they open a feed-forward, with a pair of them.

    The names are those of `grouped_products`. matrices: from this one on, each of `outputs` rows of `width`; c: float32
    [1 or 2, task, ldc], this thread's sums; result: [T, outputs], or, where hidden activations are made, empty.
    """
    first, stride, pair, ldc = groups.first, row_stride(variant, width), 2 if opens else 1, c.shape[2]
    begin, most_rows = take_rows(queue, task, outputs, threads, alike)
    while begin < outputs:
        most_rows = min(most_rows, outputs - begin)
        for t in range(result.shape[0]):
            for r in range(begin, begin + most_rows):
                result[t, r] = 0
        for g in range(groups.expert.size):
            count, packed, used = first[g + 1] - first[g], groups.packed[g], groups.hidden[g]
            rows, k = most_rows, used
            if opens:
                rows, k = min(rows, used - begin), width
                if rows <= 0:
                    continue
            expert = 2 * outputs * width  # bytes
            offset, needed_from = groups.expert[g] * expert + 2 * begin * width, begin if opens else 0
            for i in range(pair):
                onward = _onward(matrices, pair, i, groups, g, needed_from, expert)
                w, x, made = matrices[i] + offset, words + 4 * at[g], c.ctypes.data + 4 * i * task * ldc
                call_block_product(
                    multiply,
                    (variant, packed, w, width, rows, x, stride, count, k, made, ldc, onward, scratch),
                )
            if opens:
                _gate(c[0], c[1], rows, (count + 15) // 16 * 16 if packed else count)
                h, next_stride = words + 4 * hidden_at[g], row_stride(variant, between)
                _store_hidden(variant, packed, c[0], begin, rows, count, h, used, next_stride)
            else:
                token, part = groups.token[first[g] : first[g + 1]], groups.routing_weights[first[g] : first[g + 1]]
                _add(c[0], rows, token, part, result, begin)
        begin, most_rows = take_rows(queue, task, outputs, threads, alike)


_INTS, _FLOATS, _INT = types.intp[::1], types.float32[::1], types.intp
_tasks = FunctionPointer(
    _take_tasks,
    *(None, _INT, types.boolean, _INTS, GROUPS, _INT, _INTS, _INTS, *[_INT] * 5, types.boolean, _INT),
    *(types.float32[:, :, ::1], _INT, types.float32[:, ::1]),
)
_call_tasks = _tasks.call


@lru_cache(maxsize=64)
def addresses(variant: KernelVariant) -> tuple[int, int, int]:
    """The addresses of what `grouped_products` calls; compiled, or read from the cache, where that is not done."""
    kind = typeof(variant)
    return pack.address(kind), block_product.address(kind), _tasks.address(kind)


def run(
    variant: KernelVariant,
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    hidden: np.ndarray,
    matrices: np.ndarray,
    outputs: np.ndarray,
    gated: bool,
    y: np.ndarray,
    multiplications: int,
) -> bool:
    """`grouped_products` on as many threads as so many multiplications are worth; False where an id is none."""
    x = np.ascontiguousarray(x)
    with threads_for(multiplications) as threads:
        arguments = variant, x, expert_ids, routing_weights, hidden, matrices, outputs, gated, y
        lacks: int = grouped_products(*arguments, workspace.words, threads, addresses(variant))
        if lacks > 0:
            lacks = grouped_products(*arguments, workspace.grow(lacks), threads, addresses(variant))
    assert lacks <= 0
    return lacks == 0


def compile_grouped_products(variant: KernelVariant) -> None:
    """Compile `grouped_products`, or read it from the cache; nothing is computed."""
    x, expert_ids, routing_weights = np.zeros((1, 2), np.float32), np.full((1, 1), -1), np.ones((1, 1), np.float32)
    one = np.ones(1, np.int64)
    lacks = grouped_products(
        variant, x, expert_ids, routing_weights, one, one, one, False, x.reshape(-1), workspace.words, 1, (0, 0, 0)
    )
    assert lacks == -1


workspace = Workspace()


@kernel
def grouped_products(
    variant: KernelVariant,
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    hidden: np.ndarray,
    matrices: np.ndarray,
    outputs: np.ndarray,
    gated: bool,
    y: np.ndarray,
    memory: np.ndarray,
    threads: int,
    addresses: tuple[int, int, int],
) -> int:
    """Products of each token's experts with its x [T, K], for stacks of matrices [E, outputs, K] at these addresses.

    Gated, three of them: y [T, outputs[2]] = sum over j of share[t, j] * third . (silu(first . x) * (second . x)), of
    expert ids[t, j], over as many hidden rows as `hidden` [E] says. Otherwise for every matrix, one after the other,
    y [T, outputs] = sum over j of share[t, j] * matrix . x[t], over as many elements as `hidden` says.
    `y` is flat. Returns 0, or, having done nothing, how many words `memory`, a workspace, needs, or -1 where an id is
    not one of `hidden`'s. On `threads` threads, which share out weight rows. addresses: `addresses(variant)`.
    """
    tokens, width = x.shape
    for t in range(tokens):
        for j in range(expert_ids.shape[1]):
            if not 0 <= expert_ids[t, j] < hidden.size:
                return -1
    between = outputs[0] if gated else 0  # hidden width
    # made here, since Numba hands a named tuple to the threads only where it sees its class
    groups = Groups(*group_tokens(variant, expert_ids, routing_weights, hidden, width % 2 == 0 and between % 2 == 0))
    first = groups.first
    most, alike = np.int64(0), True
    for g in range(groups.expert.size):
        most, alike = max(most, first[g + 1] - first[g]), alike and not groups.packed[g]
    # a row of sums is a vector longer than needed: rows a power of two apart would share their places in the cache
    ldc = (most + 15) // 16 * 16 + 16
    tasks = np.empty(outputs.size, np.int64)
    sums_words, largest = 0, np.int64(0)
    for i in range(outputs.size):
        tasks[i] = task_rows(variant, most, outputs[i], threads)
        largest = max(largest, tasks[i])
        sums_words = max(sums_words, threads * (2 if gated and i == 0 else 1) * tasks[i] * ldc)
    scratch = (scratch_words(variant, largest) + 15) // 16 * 16
    x_at = places(variant, groups, width, (sums_words + 15) // 16 * 16 + threads * scratch)
    hidden_at = places(variant, groups, between, x_at[-1])
    needed: int = hidden_at[-1]
    if memory.size < needed:
        return needed
    words, (pack_columns, multiply, take_tasks) = memory.ctypes.data, addresses
    scratch_at = words + 4 * (x_at[0] - threads * scratch)
    queues = np.zeros(outputs.size, np.int64)
    done = 0  # elements of y
    for stage in range(-1, 2 if gated else outputs.size):  # the first one packs, and has no rows, tasks or results
        packs, opens, closes = stage < 0, gated and stage == 0, gated and stage == 1
        which = 0 if packs else 2 if closes else stage
        rows_of_all, task, queue = outputs[which], tasks[which], queues.ctypes.data + 8 * which
        k_of_all, at = (between, hidden_at) if closes else (width, x_at)
        pair, written = 2 if opens else 1, 0 if packs or opens else tokens
        result = y[done : done + written * rows_of_all].reshape(written, rows_of_all)
        done += result.size
        sums = memory[: threads * pair * task * ldc].reshape(threads, pair, task, ldc)
        for thread in prange(threads):
            if packs:
                call_pack(pack_columns, (variant, x, groups, words, x_at, thread, threads))
            else:
                _call_tasks(
                    take_tasks,
                    (
                        *(variant, multiply, opens, matrices[which:], groups, words, at, hidden_at, between),
                        *(rows_of_all, k_of_all, task, queue, alike, threads, sums[thread]),
                        *(scratch_at + 4 * thread * scratch, result),
                    ),
                )
    return 0


_MATRIX = types.float32[:, ::1]
products = FunctionPointer(
    grouped_products,
    *(None, _MATRIX, types.int64[:, ::1], _MATRIX, _INTS, _INTS, _INTS, types.boolean, _FLOATS, _FLOATS),
    *(_INT, types.UniTuple(_INT, 3)),
    returns=_INT,
)
