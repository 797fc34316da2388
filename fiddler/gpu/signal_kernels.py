"""Triton kernels by which a captured graph exchanges signals, a layer's inputs and its sums with the host.

Knows numbers and vectors, no layers. The signals lie in pinned memory. Their numbers differ from step to step, and a
graph's constants do not: so they follow from one in the GPU's memory. Each kernel is one program: a layer waits for
every launch between the CPU's sum and the choice of the next layer's experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.offload.token_signals import Place

__all__ = ["Signals", "hand_over", "run_each_kind", "take_sums", "tell_and_wait"]

_NOWHERE = Place(0, 0, 0)


class Signals(NamedTuple):
    """What the kernels between the experts of two layers tell and wait for."""

    computed: Place | None = None  # told: the streamed experts of the layer before are used
    summed: Place | None = None  # awaited: the CPU's sum of that layer is there
    arrived: Place | None = None  # told: the next layer's inputs are on the host


_VARYING = ["told_times", "told_plus", "awaited_times", "awaited_plus"]


@triton.jit
def _tell(first, told, told_times, told_plus):
    """Set a signal, after all that this program, and the kernels before it, have written."""
    tl.debug_barrier()
    number = (tl.load(first) * told_times + told_plus).to(tl.int32)
    tl.atomic_xchg(told.to(tl.pointer_type(tl.int32)), number, sem="release", scope="sys")


@triton.jit
def _wait(first, awaited, awaited_times, awaited_plus):
    """Wait until a signal is at its number, or later, modulo 2**32."""
    number = (tl.load(first) * awaited_times + awaited_plus).to(tl.int32)
    signal = awaited.to(tl.pointer_type(tl.int32))
    while tl.load(signal, volatile=True) - number < 0:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=_VARYING)
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
    if TELL:
        _tell(first, told, told_times, told_plus)
    if WAIT:
        _wait(first, awaited, awaited_times, awaited_plus)


def tell_and_wait(first: Tensor, told: Place | None, awaited: Place | None) -> None:
    """Set a signal, after all work queued so far, then hold the stream until another one is at its number, or later.

    first: int64 [1], on the GPU, the number of the step's first layer with missing experts.
    """
    places = *(told or _NOWHERE), *(awaited or _NOWHERE)
    _tell_and_wait[(1,)](first, *places, TELL=told is not None, WAIT=awaited is not None, num_warps=1)


def run_each_kind(first: Tensor, place: Place) -> None:
    """Compile the kernel for all that `tell_and_wait` may have to do. place: a signal, which gets its number."""
    for told, awaited in ((place, None), (None, place), (place, place)):
        tell_and_wait(first, told, awaited)


@triton.jit(do_not_specialize=["told_times", "told_plus"])
def _hand_over(
    first,
    told,
    told_times,
    told_plus,
    x,
    expert_ids,
    routing_weights,
    device_out,
    host_out,
    width,
    TELL: tl.constexpr,
    TOP: tl.constexpr,
    K: tl.constexpr,
):
    k = tl.arange(0, K)
    values = tl.load(x + k, mask=k < width)
    tl.store(host_out + k, values, mask=k < width)
    for j in tl.static_range(TOP):
        tl.store(host_out + width + j, tl.load(expert_ids + j).to(tl.float32))
        routing_weight = tl.load(routing_weights + j)
        tl.store(device_out + width + j, routing_weight)
        tl.store(host_out + width + TOP + j, routing_weight)
    if TELL:
        _tell(first, told, told_times, told_plus)
    tl.store(device_out + k, values, mask=k < width)


def hand_over(
    x: Tensor,
    expert_ids: Tensor,
    routing_weights: Tensor,
    device_out: Tensor,
    host_out: Tensor,
    first: Tensor,
    told: Place | None,
) -> None:
    """Write x [1, D] and routing_weights [1, K] to device_out [D + K]; to host_out with expert_ids [1, K] between.

    Outputs are float32. host_out [D + 2 K] is pinned memory, which the GPU writes over PCIe. told: a signal, which is
    set when it has; first: see `tell_and_wait`.
    """
    width, tell = x.shape[1], told is not None
    _hand_over[(1,)](
        *(first, *(told or _NOWHERE), x, expert_ids, routing_weights, device_out, host_out, width),
        TELL=tell,
        TOP=expert_ids.shape[1],
        K=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )


@triton.jit(do_not_specialize=_VARYING)
def _take_sums(
    first,
    told,
    told_times,
    told_plus,
    awaited,
    awaited_times,
    awaited_plus,
    h,
    on_gpu,
    on_cpu,
    norm,
    out,
    x,
    width,
    epsilon,
    TELL: tl.constexpr,
    WAIT: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
):
    if TELL:
        _tell(first, told, told_times, told_plus)
    k = tl.arange(0, K)
    inside = k < width
    total = tl.load(h + k, mask=inside, other=0.0) + tl.load(on_gpu + k, mask=inside, other=0.0)
    if WAIT:
        _wait(first, awaited, awaited_times, awaited_plus)
    total += tl.load(on_cpu + k, mask=inside, other=0.0, volatile=True)
    tl.store(out + k, total, mask=inside)
    if NORM:
        scale = tl.rsqrt(tl.sum(total * total, 0) / width + epsilon)
        tl.store(x + k, total * scale * tl.load(norm + k, mask=inside, other=0.0), mask=inside)


def take_sums(
    h: Tensor,
    on_gpu: Tensor,
    on_cpu: Tensor,
    norm: Tensor | None,
    epsilon: float,
    first: Tensor,
    told: Place | None,
    awaited: Place | None,
) -> tuple[Tensor, Tensor | None]:
    """h + on_gpu + on_cpu, all [1, D] float32, and its RMS norm with weights [D], or None without them.

    The GPU reads on_cpu, in pinned memory, over PCIe, when `awaited` is at its number. first, told: see
    `tell_and_wait`.
    """
    width = h.shape[1]
    out, x = torch.empty_like(h), None if norm is None else torch.empty_like(h)
    places = *(told or _NOWHERE), *(awaited or _NOWHERE)
    vectors = h, on_gpu, on_cpu, h if norm is None else norm, out, out if x is None else x  # not read, not written
    _take_sums[(1,)](
        *(first, *places, *vectors, width, epsilon),
        TELL=told is not None,
        WAIT=awaited is not None,
        NORM=norm is not None,
        K=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return out, x


def _warps(width: int) -> int:
    """Warps of a program that holds a vector, each with 16 numbers a thread: the fewer, the less they ask the host."""
    warps: int = triton.next_power_of_2(width) // 512
    return max(1, min(8, warps))
