"""One token's layer on the CPU as one compiled call: wait for the router's choice, divide, compute, tell the GPU.

Knows the order of these; not how work is planned, nor who copies what. One call, because the products evict Python's
code and data from the caches: between the wait and the products, and after them, it would take several times as long as
alone, while the GPU waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
from numba import typeof, types

from fiddler.kernels.codegen.function_pointer import FunctionPointer
from fiddler.kernels.codegen.jit import kernel
from fiddler.kernels.codegen.variant import KernelVariant
from fiddler.kernels.machine.clock import now
from fiddler.kernels.machine.signals import SIGNAL_STRIDE, set_signal
from fiddler.kernels.machine.threads import one_caller, thread_count
from fiddler.kernels.matmul import grouped
from fiddler.kernels.matmul.products_call import BoundProducts
from fiddler.kernels.one_token import ARRAYS, INVALID, NOT_YET, SEND_HERE, Signal, TokenDivision, divide

__all__ = ["TokenLayer"]

_DONE = 1 << 21  # added to the number of missing experts: the CPU's sum is there
_SUMMED = int(Signal.SUMMED)
_call_products = grouped.products.call


class TokenLayer:
    """A layer of one token, whose inputs and output lie in fixed arrays."""

    def __init__(
        self, division: TokenDivision, missing: np.ndarray, counts: np.ndarray, products: BoundProducts
    ) -> None:
        """missing: bool [E], read by each call. counts: int64 [E], which each call increases for each chosen expert.

        products: of `ExpertFfn.bind`, with the ids and the rows of `division`, into float32 [1, D].
        """
        _, expert_ids, _, rows = products.arguments[:4]
        if expert_ids is not division.expert_ids or rows is not division.cpu_rows:
            raise ValueError("these products have not the expert ids and the rows of this division")
        self._division, self._products, self._experts = division, products, missing.size
        self._out = products.arguments[8]
        self._arrays = division.arrays(missing, counts)
        self._call = _layer.entry(typeof(products.variant))
        self.times = np.zeros(2)
        """When the layer was divided, and when the CPU's sum was there, by time.perf_counter [s]."""

    def __call__(self, number: int, plans: np.ndarray, send: Callable[[int], None]) -> int:
        """Divide the layer by `plans` once ARRIVED has its number, compute the CPU's part, and set SUMMED.

        Returns the number of missing experts; or NOT_YET, after half a millisecond or so in which nothing arrived.
        plans: see `TokenDivision.plans`. send: called with the number of missing experts where no other thread waits to
        send the GPU's part. Raises ValueError where an expert id is out of range.
        """
        products, threads = self._products, thread_count()
        computes = products.parallel or threads == 1
        head = products.variant, self._arrays, number, self._division.hidden, plans, computes, products.address
        with one_caller():
            result: int = self._call(
                *head, self.times, *products.arguments, grouped.workspace.words, threads, products.addresses
            )
        if result >= _DONE:
            return result - _DONE
        if result == NOT_YET:
            return NOT_YET
        if result == INVALID:
            chosen = self._arrays[1][0].tolist()
            raise ValueError(f"an expert id of {chosen} lies outside 0..{self._experts - 1}")
        if result >= SEND_HERE:
            result -= SEND_HERE
            send(result)
        self._compute(number)
        return result

    def _compute(self, number: int) -> None:
        """The part after the division: where that is sent from here, on one of several threads, or needs workspace."""
        if self._division.cpu_rows.any():
            self._products()
        else:
            self._out[:] = 0
        self.times[1] = time.perf_counter()
        self._division.signals[_SUMMED * SIGNAL_STRIDE] = number & 0xFFFFFFFF


@partial(kernel, parallel=False)
def _divide_and_compute(
    variant: KernelVariant,
    arrays: tuple[np.ndarray, ...],
    number: int,
    hidden: int,
    plans: np.ndarray,
    computes: bool,
    products: int,
    times: np.ndarray,
    x: np.ndarray,
    expert_ids: np.ndarray,
    routing_weights: np.ndarray,
    rows: np.ndarray,
    matrices: np.ndarray,
    stored: np.ndarray,
    outputs: np.ndarray,
    activation: int,
    out: np.ndarray,
    biases: np.ndarray,
    memory: np.ndarray,
    threads: int,
    addresses: tuple[int, int],
) -> int:
    """See `TokenLayer`. products: the address of `grouped_products`, whose arguments are those from `x` on.

    Returns what `divide` does, plus _DONE where the sum is there: not where the caller has to send, where it does not
    want it, nor where the workspace is too small.
    """
    result: int = divide(arrays, number, hidden, plans)
    times[0] = now()
    if not computes or result < 0 or result >= SEND_HERE:
        return result
    left = 0
    for j in range(expert_ids.shape[1]):
        left += rows[expert_ids[0, j]]
    if left == 0:
        out[:] = 0
    else:
        of_layer = x, expert_ids, routing_weights, rows, matrices, stored, outputs, activation, out, biases
        if _call_products(products, (variant, *of_layer, memory, threads, addresses)) != 0:
            return result
    times[1] = now()
    set_signal(arrays[0], _SUMMED, number)
    return result + _DONE


_layer = FunctionPointer(
    _divide_and_compute,
    *(None, ARRAYS, types.int64, types.int64, types.int64[:, ::1], types.boolean, types.intp, types.float64[::1]),
    *grouped.ARGUMENTS,
    returns=types.int64,
)
