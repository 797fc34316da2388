"""Triton kernel by which a captured graph sets signals in pinned memory, and waits for them. Knows numbers, no layers.

Numbers differ from step to step, and a graph's constants do not: so they follow from one in the GPU's memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fiddler.offload.token_signals import Place

__all__ = ["run_each_kind", "tell_and_wait"]


@triton.jit(do_not_specialize=["told_times", "told_plus", "awaited_times", "awaited_plus"])
def _tell_and_wait(
    first,
    told,
    told_times,
    told_plus,
    awaited,
    awaited_times,
    awaited_plus,
    TELL: tl.constexpr,
    WAIT: tl.constexpr,
):
    base = tl.load(first)
    if TELL:
        number = (base * told_times + told_plus).to(tl.int32)
        tl.atomic_xchg(told.to(tl.pointer_type(tl.int32)), number, sem="release", scope="sys")
    if WAIT:
        number = (base * awaited_times + awaited_plus).to(tl.int32)
        signal = awaited.to(tl.pointer_type(tl.int32))
        while tl.load(signal, volatile=True) - number < 0:  # modulo 2**32
            pass


def tell_and_wait(first: Tensor, told: Place | None, awaited: Place | None) -> None:
    """Set a signal, after all work queued so far, then hold the stream until another one is at its number, or later.

    first: int64 [1], on the GPU, the number of the step's first layer with missing experts.
    """
    told_at, awaited_at = told or Place(0, 0, 0), awaited or Place(0, 0, 0)
    _tell_and_wait[(1,)](first, *told_at, *awaited_at, TELL=told is not None, WAIT=awaited is not None, num_warps=1)


def run_each_kind(first: Tensor, place: Place) -> None:
    """Compile the kernel for all that `tell_and_wait` may have to do. place: a signal, which gets its number."""
    for told, awaited in ((place, None), (None, place), (place, place)):
        tell_and_wait(first, told, awaited)
