"""One token's missing experts: which rows each side computes, by a table of plans, as soon as the GPU has chosen them.

Knows arrays and numbers in memory; not how plans are made, who copies what, nor the products: see `token_layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import partial

import numpy as np
from numba import types

from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.machine.signals import SIGNAL_STRIDE, set_signal, signal, wait_for

__all__ = ["ARRAYS", "INVALID", "NOT_YET", "SEND_HERE", "Signal", "TokenDivision", "divide"]

NOT_YET = -2
"""Nothing arrived: ask again."""
SEND_HERE = 1 << 20
"""Added to the number of missing experts: no other thread sends this layer's copies."""
INVALID = -1
"""An expert id is out of range."""


class Signal(IntEnum):
    """Numbers by which the threads and the streams of a step of single tokens wait for each other.

    Each is a uint32 that begins 64 bytes after the one before. A layer has a number, larger than those before it; the
    copies of its GPU's part have numbers of their own: see `TokenCopies`.
    """

    ARRIVED = 0  # of the last layer whose inputs and expert ids are on the host; the GPU sets it
    SENT = 1  # of the last copies that are on the GPU; set in the stream of the copies
    COMPUTED = 2  # of the last copies that the GPU has used; the GPU sets it
    SUMMED = 3  # of the last layer whose sum the CPU has written
    DIVIDED = 4  # of the last layer that is divided
    QUEUED = 5  # of the last layer whose copies are queued
    SENDING = 6  # not 0: a thread waits for DIVIDED and sends
    STOPPED = 7  # not 0: nobody waits for the step


_ARRIVED, _DIVIDED, _SENDING = int(Signal.ARRIVED), int(Signal.DIVIDED), int(Signal.SENDING)


class TokenDivision:
    """Divides the missing experts of one token; its arrays hold the result until the next call."""

    def __init__(self, chosen: np.ndarray, experts: int, hidden: int, signals: np.ndarray) -> None:
        """chosen: float32 [1, K], distinct expert ids, read by each call. hidden: rows of an expert.

        signals: uint32 [len(Signal) * SIGNAL_STRIDE].
        """
        if chosen.ndim != 2 or len(chosen) != 1 or chosen.dtype != np.float32 or not chosen.flags.c_contiguous:
            raise ValueError(f"chosen is {chosen.dtype} {chosen.shape}; expected contiguous float32 [1, K]")
        if signals.shape != (len(Signal) * SIGNAL_STRIDE,) or signals.dtype != np.uint32:
            raise ValueError(f"signals are {signals.dtype} {signals.shape}; expected uint32")
        k = chosen.shape[1]
        self.signals = signals
        self._chosen, self._experts, self._k, self.hidden = chosen, experts, k, hidden
        self.expert_ids = np.zeros((1, k), np.int64)
        self.cpu_rows = np.zeros(experts, np.int64)
        """int64 [E], hidden rows of each expert that the CPU computes, from the first on."""
        self.gpu_rows = np.zeros((k, 2), np.int64)
        """int64 [K, 2]: the index of an expert id, and its last hidden rows that the GPU computes, 0 at the end."""

    def plans(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """A table for `divide`: rows[n]: the GPU's hidden rows of each of n missing experts, for n from 0 to K."""
        table = np.zeros((self._k + 1, self._k), np.int64)
        if len(rows) != self._k + 1:
            raise ValueError(f"plans for {len(rows)} numbers of missing experts; expected 0 to {self._k}")
        for missing, each in enumerate(rows):
            self.set_plan(table, missing, each)
        return table

    def set_plan(self, table: np.ndarray, missing: int, rows: Sequence[int]) -> None:
        """Change a table of `plans` for one number of missing experts."""
        if len(rows) != missing or any(not 0 <= count <= self.hidden for count in rows):
            raise ValueError(f"the GPU's rows {rows} of {missing} experts; expected so many, within 0..{self.hidden}")
        table[missing, :missing] = rows

    def arrays(self, missing: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays of a layer for `divide`. missing: bool [E], read by each call. counts: int64 [E]."""
        for name, array, dtype in (("missing", missing, np.bool_), ("counts", counts, np.int64)):
            if array.shape != (self._experts,) or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(f"{name} is {array.dtype} {array.shape}; expected contiguous [{self._experts}]")
        return self.signals, self._chosen, missing, self.expert_ids, self.cpu_rows, self.gpu_rows, counts


@partial(kernel, parallel=False)
def divide(arrays: tuple[np.ndarray, ...], number: int, hidden: int, plans: np.ndarray) -> int:
    """Divide the missing experts of `chosen` by a table of `plans`, once ARRIVED has this number.

    arrays: `TokenDivision.arrays`. Increases `counts` of each chosen expert. Returns the number of missing experts,
    plus SEND_HERE where no thread waits to send the GPU's part, which the caller has to; else it has set DIVIDED. Or
    NOT_YET, after half a millisecond or so in which nothing arrived; or INVALID, with all as before, where an expert id
    is out of range.
    """
    signals, chosen, missing, expert_ids, cpu_rows, gpu_rows, counts = arrays
    if not wait_for(signals, _ARRIVED, number):
        return NOT_YET
    count, streamed = 0, 0
    for j in range(chosen.shape[1]):
        if not 0 <= chosen[0, j] < missing.size:
            return INVALID
    for j in range(chosen.shape[1]):
        cpu_rows[expert_ids[0, j]] = 0
    for j in range(chosen.shape[1]):
        expert = np.int64(chosen[0, j])
        expert_ids[0, j] = expert
        counts[expert] += 1
        count += missing[expert]
    i = 0
    for j in range(chosen.shape[1]):
        gpu_rows[j, 1] = 0
        if missing[expert_ids[0, j]]:
            rows = plans[count, i]
            cpu_rows[expert_ids[0, j]] = hidden - rows
            if rows > 0:
                gpu_rows[streamed, 0], gpu_rows[streamed, 1] = j, rows
                streamed += 1
            i += 1
    if signal(signals, _SENDING) == 0:
        return count + SEND_HERE
    set_signal(signals, _DIVIDED, number)
    return count


_IDS = types.int64[:, ::1]
_INTS = types.int64[::1]
ARRAYS = types.Tuple((types.uint32[::1], types.float32[:, ::1], types.boolean[::1], _IDS, _INTS, _IDS, _INTS))
"""The type of `TokenDivision.arrays`."""
