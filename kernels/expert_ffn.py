"""The feed-forward of all selected experts of one layer at once, from 16-bit weights where they lie.

y[t] = sum over j of weights[t, j] * down_e . (silu(gate_e . x[t]) * (up_e . x[t])),  e = ids[t, j].

Two parallel regions: gate, up and their product; then down and the weighted sum. Each splits the *rows* of every
selected expert over all threads, so no thread waits for a busier expert, and each output element is the work of
one task in one order: the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from fiddler.kernels.jit import kernel
from fiddler.kernels.matmul import (
    PANEL,
    aligned_words,
    block_product,
    pack,
    padded_width,
    read_only,
    silu,
    takes_packed,
    task_rows,
    weighted_products,
    words_for,
)
from fiddler.kernels.product import Product
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
    experts = np.flatnonzero(counts)
    counts = counts[experts]
    first = np.concatenate(([0], np.cumsum(counts)))
    token = order // ids.shape[1]
    share = weights.reshape(-1).astype(np.float32)[order]
    packed = takes_packed(product, counts, width, hidden)
    x_words, h_words = (words_for(product, counts, packed, k) for k in (width, hidden))
    x_at, h_at = (np.concatenate(([0], np.cumsum(words))) for words in (x_words, h_words))
    xs, hs = aligned_words(x_at[-1]), aligned_words(h_at[-1])
    x_row, h_row = padded_width(product, width), padded_width(product, hidden)
    task = task_rows(int(counts.max()))
    with threads_for(3 * flat.size * width * hidden):
        pack(product, x, token, first, packed, x_at, xs, x_row)
        _gate_up(product, gate, up, experts, first, packed, x_at, xs, x_row, h_at, hs, h_row, task)
        weighted_products(product, down, experts, first, packed, token, share, h_at, hs, h_row, task, y)
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


@kernel
def _gate_up(
    product: Product,
    gate: np.ndarray,
    up: np.ndarray,
    experts: np.ndarray,
    first: np.ndarray,
    packed: np.ndarray,
    x_at: np.ndarray,
    xs: np.ndarray,
    x_row: int,
    h_at: np.ndarray,
    hs: np.ndarray,
    h_row: int,
    task: int,
) -> None:
    """h = silu(gate . x) * (up . x), each group in its layout."""
    hidden, width = gate.shape[1], gate.shape[2]
    most = 0
    for g in range(experts.size):
        most = max(most, first[g + 1] - first[g])
    ldc = (most + 15) // 16 * 16
    for block in prange((hidden + task - 1) // task):
        begin = block * task
        rows = min(task, hidden - begin)
        scratch = np.empty((2, task, ldc), np.float32)
        for g in range(experts.size):
            count = first[g + 1] - first[g]
            padded = (count + 15) // 16 * 16
            ldx = padded if packed[g] else x_row
            x = xs.ctypes.data + 4 * x_at[g]
            offset = 2 * (experts[g] * hidden + begin) * width
            for half in range(2):  # one call in a loop, since each call is inlined: half the time to compile
                w = (gate.ctypes.data if half == 0 else up.ctypes.data) + offset
                c = scratch.ctypes.data + 4 * half * task * ldc
                block_product(product, packed[g], w, width, rows, x, ldx, count, width, c, ldc)
            a, b = scratch[0], scratch[1]
            used = padded if packed[g] else count
            for r in range(rows):
                for m in range(used):  # nothing but arithmetic on arrays, so that it becomes vector code
                    a[r, m] = silu(a[r, m]) * b[r, m]
            h = hs.ctypes.data + 4 * h_at[g]
            if packed[g]:
                for panel in range(0, padded, PANEL):
                    wide = min(PANEL, padded - panel)
                    for r in range(0, rows, 2):
                        word = panel * (hidden // 2) + (begin + r) // 2 * wide - panel
                        for m in range(panel, panel + wide):
                            store_pair(h, word + m, a[r, m], a[r + 1, m])
            else:
                for m in range(count):
                    for r in range(rows):
                        store_activation(product, h, m * h_row + begin + r, a[r, m])
