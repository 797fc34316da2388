"""Activations of one token rounded to int8 on the GPU: as `matmul/int8_activations.py` rounds them for the CPU.

32 neighbours, a group, share a scale: their largest magnitude / 127. Where one of them is no number or infinite, the
scale is too, and so is each product. `formats/triton_words.py` says how they lie in memory. Knows no weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.kernels.formats.block_format import GROUP
from fiddler.offload.activation_kernels import hidden_activation

__all__ = ["bytes_of", "planes_of", "rounded", "rounded_hidden"]

_GROUPS = 16  # of a program
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}  # a product is rounded before it is cut to int8


@triton.jit
def _store(a, group, lane, values, inside, planes):
    """Values [G, 32] of groups [G], as int8 and scales."""
    magnitude = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as integers: infinities and NaN are largest
    largest = tl.max(magnitude, 1).to(tl.float32, bitcast=True)
    divisor = tl.full(largest.shape, 127.0, tl.float32)
    inverse = tl.where(largest < 1e-36, 0.0, tl.div_rn(divisor, largest))  # of less, it would not be finite
    scaled = values * inverse[:, None]
    nearest = (scaled + 12582912.0) - 12582912.0  # 1.5 * 2**23: to the nearest integer, half to even
    code = tl.where(scaled == scaled, nearest, 0.0).to(tl.int8)
    plane = (group % 2 * 2)[:, None] + (lane // 16)[None, :]
    at = a + (plane * planes + (group // 2)[:, None]) * 16 + (lane % 16)[None, :]
    tl.store(at.to(tl.pointer_type(tl.int8), bitcast=True), code, mask=inside[:, None])
    scales = (a + planes * 64).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales + group, tl.div_rn(largest, divisor), mask=inside)


@triton.jit
def _round(x, a, groups, planes, G: tl.constexpr):
    group, lane = tl.program_id(0) * G + tl.arange(0, G), tl.arange(0, 32)
    inside = group < groups
    values = tl.load(x + group[:, None] * 32 + lane[None, :], mask=inside[:, None], other=0.0)
    _store(a, group, lane, values, inside, planes)


@triton.jit
def _round_hidden(
    jobs,
    expert_ids,
    sums,
    a,
    gate_bias,
    up_bias,
    max_rows,
    planes,
    job_bytes,
    BY_ID: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    G: tl.constexpr,
):
    j = tl.program_id(1)
    job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
    rows = tl.load(job + 3)
    if tl.program_id(0) * (G * 32) < rows:
        group, lane = tl.program_id(0) * G + tl.arange(0, G), tl.arange(0, 32)
        inside = group * 32 < rows  # whole groups, so that a thread loads 16 bytes at a time
        r = group[:, None] * 32 + lane[None, :]
        of_gate = tl.load(sums + 2 * j * max_rows + r, mask=inside[:, None], other=0.0)
        of_up = tl.load(sums + (2 * j + 1) * max_rows + r, mask=inside[:, None], other=0.0)
        if BIASED:
            first = tl.load(job + 5)
            of_gate += tl.load(gate_bias + first + r, mask=inside[:, None], other=0.0)
            of_up += tl.load(up_bias + first + r, mask=inside[:, None], other=0.0)
        _store(a + j * job_bytes, group, lane, hidden_activation(of_gate, of_up, CLAMPED), inside, planes)


def planes_of(width: int) -> int:
    """Pairs of groups of `width` activations, a multiple of 32."""
    return (width // GROUP + 1) // 2


def bytes_of(width: int) -> int:
    """Size of `width` rounded activations, a multiple of 16 [bytes]."""
    return (planes_of(width) * 72 + 15) // 16 * 16


def rounded(x: Tensor) -> Tensor:
    """x [1, K] float32, K a multiple of 32, as uint8 [bytes]."""
    width = x.shape[1]
    a, groups = torch.empty(bytes_of(width), dtype=torch.uint8, device=x.device), width // GROUP
    _round[(triton.cdiv(groups, _GROUPS),)](x, a, groups, planes_of(width), G=_GROUPS, **_OPTIONS)
    return a


def rounded_hidden(
    jobs: Tensor, expert_ids: Tensor | None, sums: Tensor, biases: tuple[Tensor, Tensor] | None, *, clamped: bool
) -> Tensor:
    """The hidden activations of jobs, as uint8 [n, bytes].

    jobs, expert_ids: see `expert_kernels.experts_of_one`. sums: float32 [n, 2, rows], the products with gate and up;
    rows that a job has not are not read. biases: those that the jobs number, of gate and up, are added first.
    """
    count, _, rows = sums.shape
    a = torch.empty(count, bytes_of(rows), dtype=torch.uint8, device=sums.device)
    gate_bias, up_bias = biases or (sums, sums)  # not read
    _round_hidden[(triton.cdiv(rows, GROUP * _GROUPS), count)](
        *(jobs, jobs if expert_ids is None else expert_ids, sums, a, gate_bias, up_bias),
        *(rows, planes_of(rows), a.shape[1]),
        BY_ID=expert_ids is not None,
        BIASED=biases is not None,
        CLAMPED=clamped,
        G=_GROUPS,
        **_OPTIONS,
    )
    return a
