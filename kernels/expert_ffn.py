"""The feed-forward of all selected experts of one layer at once, from 16-bit weights where they lie.

y[t] = sum over j of weights[t, j] * down_e . (silu(gate_e . x[t]) * (up_e . x[t])),  e = ids[t, j].

Two parallel regions: gate, up and their product; then down and the weighted sum. Each splits the *rows* of every
selected expert over all threads, so no thread waits for a busier expert, and each output element is the work of
one task in one order: the result does not depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from fiddler.kernels.jit import kernel
from fiddler.kernels.layout import group_tokens, pack, padded_width, place, read_only
from fiddler.kernels.matmul import block_product, weighted_products
from fiddler.kernels.product import Product, in_pairs, panel_tokens
from fiddler.kernels.tasks import new_queue, take_task, task_rows
from fiddler.kernels.threads import threads_for
from fiddler.kernels.tiles import store_activation, store_pair

__all__ = ["expert_ffn"]


def expert_ffn(
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    product: Product,
) -> np.ndarray:
    """Weighted sum of each token's experts: float32 [T, D].

    x: float32 [T, D]; ids: integer [T, K], the experts of each token; weights: float32 [T, K].
    gate, up: uint16 bits [E, F, D]; down: uint16 bits [E, D, F]; any of them may be a read-only mapping.
    `product` says how those bits are read and to what activations are rounded: x before the first products, the
    SwiGLU product before the second.
    Raises ValueError when a shape, a data type, the memory order or an expert id does not fit.
    """
    tokens, width, hidden = _validate(x, ids, weights, gate, up, down)
    y = np.empty((tokens, width), np.float32)
    if tokens == 0 or ids.shape[1] == 0:
        y[:] = 0
        return y
    gate, up, down = read_only(gate), read_only(up), read_only(down)
    flat = ids.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")  # assignments, grouped by expert
    counts = np.bincount(flat, minlength=gate.shape[0])
    groups = group_tokens(product, counts, (width, hidden))
    expert, first, packed = groups.expert, groups.first, groups.packed
    token = order // ids.shape[1]
    share = weights.reshape(-1).astype(np.float32)[order]
    (x_at, xs), (h_at, hs) = place(product, groups, width), place(product, groups, hidden)
    x_row, h_row = padded_width(product, width), padded_width(product, hidden)
    most = int(counts.max())
    with threads_for(3 * flat.size * width * hidden) as threads:
        pack(product, x, token, first, packed, x_at, xs, x_row)
        task = task_rows(product, most, hidden, threads)
        _gate_up(product, gate, up, expert, first, packed, x_at, xs, x_row, h_at, hs, h_row, task, new_queue(), threads)
        task = task_rows(product, most, width, threads)
        weighted_products(
            product, down, expert, first, packed, token, share, h_at, hs, h_row, task, new_queue(), threads, y
        )
    return y


def _validate(
    x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray
) -> tuple[int, int, int]:
    if x.ndim != 2 or x.dtype != np.float32:
        raise ValueError(f"x is {x.dtype} {x.shape}; expected float32 [T, D]")
    if gate.ndim != 3 or gate.shape[2] != x.shape[1]:
        raise ValueError(f"gate is {gate.shape}; expected [E, F, {x.shape[1]}]")
    experts, hidden, width = gate.shape
    if up.shape != gate.shape or down.shape != (experts, width, hidden):
        raise ValueError(
            f"up is {up.shape} and down {down.shape}; expected {gate.shape} and {(experts, width, hidden)}"
        )
    for name, bits in (("gate", gate), ("up", up), ("down", down)):
        if bits.dtype != np.uint16 or not bits.flags.c_contiguous:
            raise ValueError(f"{name} is {bits.dtype}; expected contiguous uint16 bits")
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype.kind not in "iu" or weights.shape != ids.shape:
        raise ValueError(f"ids are {ids.dtype} {ids.shape}, weights {weights.shape}; expected [{x.shape[0]}, K] both")
    if ids.size and not (ids.min() >= 0 and ids.max() < experts):
        raise ValueError(f"an expert id lies outside 0..{experts - 1}")
    return x.shape[0], width, hidden


@intrinsic
def _float_of(_context: Any, bits: Any) -> Any:
    """uint32 bits -> the float32 they spell."""

    def generate(_: Any, b: ir.IRBuilder, _signature: Any, arguments: list[ir.Value]) -> ir.Value:
        return b.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@njit(inline="always")
def _silu(value: np.float32) -> np.float32:
    """value * sigmoid(value) in float32; plain arithmetic without calls, so that loops over it vectorise.

    exp(y) = 2**n * exp(r) with |r| <= ln(2)/2, exp(r) by its Taylor polynomial of degree 7.
    """
    y = min(max(np.float32(-value), np.float32(-87.0)), np.float32(88.0))
    n = np.floor(y * np.float32(1.4426950408889634) + np.float32(0.5))
    r = y - n * np.float32(0.693359375)  # ln(2), in two parts
    r = r + n * np.float32(2.12194440e-4)
    p = r * np.float32(1 / 5040) + np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    power = _float_of(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))
    return np.float32(value / (np.float32(1.0) + p * power))


@kernel
def _gate_up(
    product: Product,
    gate: np.ndarray,
    up: np.ndarray,
    expert: np.ndarray,
    first: np.ndarray,
    packed: np.ndarray,
    x_at: np.ndarray,
    xs: np.ndarray,
    x_row: int,
    h_at: np.ndarray,
    hs: np.ndarray,
    h_row: int,
    task: int,
    queue: np.ndarray,
    threads: int,
) -> None:
    """h = silu(gate . x) * (up . x), each group in its layout."""
    hidden, width = gate.shape[1], gate.shape[2]
    tasks = (hidden + task - 1) // task
    panel_width = panel_tokens(product)
    most = 0
    for g in range(expert.size):
        most = max(most, first[g + 1] - first[g])
    ldc = (most + 15) // 16 * 16
    for _ in prange(threads):
        scratch = np.empty((2, task, ldc), np.float32)
        a, b = scratch[0], scratch[1]
        block = take_task(queue.ctypes.data)
        while block < tasks:
            begin = block * task
            rows = min(task, hidden - begin)
            for g in range(expert.size):
                count = first[g + 1] - first[g]
                x = xs.ctypes.data + 4 * x_at[g]
                offset = 2 * (expert[g] * hidden + begin) * width
                for half in range(2):  # one call in a loop, since each call is inlined: half the time to compile
                    w = (gate.ctypes.data if half == 0 else up.ctypes.data) + offset
                    c = scratch.ctypes.data + 4 * half * task * ldc
                    block_product(product, packed[g], w, width, rows, x, x_row, count, width, c, ldc)
                padded = (count + 15) // 16 * 16
                used = padded if packed[g] else count
                for r in range(rows):
                    for m in range(used):  # nothing but arithmetic on arrays, so that it becomes vector code
                        a[r, m] = _silu(a[r, m]) * b[r, m]
                h = hs.ctypes.data + 4 * h_at[g]
                if not packed[g]:
                    for m in range(count):
                        for r in range(rows):
                            store_activation(product, h, m * h_row + begin + r, a[r, m])
                    continue
                for panel in range(0, padded, panel_width):
                    wide = min(panel_width, padded - panel)
                    if in_pairs(product):
                        for r in range(0, rows, 2):
                            word = panel * (hidden // 2) + (begin + r) // 2 * wide - panel
                            for m in range(panel, panel + wide):
                                store_pair(h, word + m, a[r, m], a[r + 1, m])
                    else:
                        for r in range(rows):
                            word = panel * hidden + (begin + r) * wide - panel
                            for m in range(panel, panel + wide):
                                store_activation(product, h, word + m, a[r, m])
            block = take_task(queue.ctypes.data)
