"""Triton kernels for one token's quantised experts with activations in int8. Knows addresses; not who streams weights.

Three launches after the token is rounded: products with gate and up; hidden activations, rounded, too
(`int8_activations`); products with down. `expert_kernels` says what the arguments are.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.gpu.int8_activations import planes_of, rounded, rounded_hidden
from fiddler.gpu.int8_gemv import TILES, int8_dots, shape_of
from fiddler.kernels.formats.triton_decoders import DOTS
from fiddler.offload.expert_biases import JobBiases

__all__ = ["int8_experts_of_one"]


@triton.jit
def _up(
    jobs,
    expert_ids,
    a,
    sums,
    gate_units,
    up_units,
    planes,
    gate_bytes,
    up_bytes,
    max_rows,
    BY_ID: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    ALIKE: tl.constexpr,
    GATE_EVEN: tl.constexpr,
    UP_EVEN: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    j = tl.program_id(1)
    matrix = tl.program_id(2)
    job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
    rows = tl.load(job + 3)
    if tl.program_id(0) * R < rows:
        r = tl.program_id(0) * R + tl.arange(0, R)
        base = tl.multiple_of(tl.load(job + matrix).to(tl.pointer_type(tl.uint8)), 16)
        index = tl.minimum(r.to(tl.int64), rows - 1)
        if ALIKE or matrix == 0:
            total = int8_dots(base + (index * gate_bytes)[:, None], a, gate_units, planes, GATE, GATE_EVEN, R, P)
        else:
            total = int8_dots(base + (index * up_bytes)[:, None], a, up_units, planes, UP, UP_EVEN, R, P)
        tl.store(sums + (2 * j + matrix) * max_rows + r, tl.sum(total, 1), mask=r < rows)


@triton.jit
def _down(
    jobs,
    expert_ids,
    routing_weights,
    a,
    y,
    bias,
    width,
    planes,
    job_bytes,
    BY_ID: tl.constexpr,
    ADD: tl.constexpr,
    BIASED: tl.constexpr,
    DOT: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    index = tl.minimum(r, width - 1).to(tl.int64)
    total = tl.zeros([R, P], tl.float32)
    if BIASED:
        biases = tl.zeros([R], tl.float32)
    for j in range(J):
        job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
        rows = tl.load(job + 3).to(tl.int32)
        routing_weight = tl.load(routing_weights + (j if BY_ID else tl.load(job + 4)))
        down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(tl.uint8)), 16)
        row_bytes = tl.multiple_of(rows // BLOCK * BLOCK_BYTES, ALIGNED)
        row = down + (index * row_bytes)[:, None]
        of_job = a + j * job_bytes
        if ALIGNED == 16 or row_bytes % 16 == 0:
            dots = int8_dots(row, of_job, rows // UNIT, planes, DOT, True, R, P)
        else:
            dots = int8_dots(row, of_job, rows // UNIT, planes, DOT, False, R, P)
        total += dots * routing_weight
        if BIASED:
            of_expert = bias + tl.load(expert_ids + j) * width
            biases += tl.load(of_expert + r, mask=r < width, other=0.0) * routing_weight
    sums = tl.sum(total, 1)
    if BIASED:
        sums += biases
    if ADD:
        sums += tl.load(y + r, mask=r < width, other=0.0)
    tl.store(y + r, sums, mask=r < width)


def int8_experts_of_one(
    x: Tensor,
    jobs: Tensor,
    routing_weights: Tensor,
    max_rows: int,
    weights: ExpertWeights,
    *,
    expert_ids: Tensor | None,
    into: Tensor,
    add: bool,
    biases: JobBiases | None,
) -> None:
    """`expert_kernels.experts_of_one` for quantised experts, with activations in int8.

    The rows of each job are whole blocks of down.
    """
    width, of_down = x.shape[1], weights.matrix_formats[2]
    sums, tile = _multiplied_up(x, jobs, expert_ids, max_rows, weights), TILES[of_down.name].long
    of_rows = None if biases is None else (biases.gate, biases.up)
    hidden = rounded_hidden(jobs, expert_ids, sums, of_rows, clamped=weights.clamped)
    down_bias, dot = None if biases is None else biases.down, DOTS[of_down.name]
    r, p = shape_of(tile, max_rows // dot.unit)
    _down[(triton.cdiv(width, r),)](
        *(jobs, jobs if expert_ids is None else expert_ids, routing_weights, hidden, into),
        *(into if down_bias is None else down_bias, width, planes_of(max_rows), hidden.shape[1]),
        BY_ID=expert_ids is not None,
        ADD=add,
        BIASED=down_bias is not None,
        DOT=dot.function,
        UNIT=dot.unit,
        BLOCK=of_down.block_length,
        BLOCK_BYTES=of_down.block_bytes,
        ALIGNED=gcd(of_down.block_bytes, 16),
        J=len(hidden),
        R=r,
        P=p,
        num_warps=tile.warps,
    )


def _multiplied_up(x: Tensor, jobs: Tensor, expert_ids: Tensor | None, max_rows: int, weights: ExpertWeights) -> Tensor:
    """The products of jobs' gate and up with x [1, D], float32 [n, 2, rows]."""
    width, (of_gate, of_up, _) = x.shape[1], weights.matrix_formats
    count = len(jobs) if expert_ids is None else expert_ids.numel()
    sums = torch.empty(count, 2, max_rows, device=x.device)
    units = [width // DOTS[each.name].unit for each in (of_gate, of_up)]
    tile = TILES[of_gate.name].wide
    r, p = shape_of(tile, max(units))
    _up[(triton.cdiv(max_rows, r), count, 2)](
        *(jobs, jobs if expert_ids is None else expert_ids, rounded(x), sums),
        *(*units, planes_of(width), of_gate.row_bytes(width), of_up.row_bytes(width), max_rows),
        BY_ID=expert_ids is not None,
        GATE=DOTS[of_gate.name].function,
        UP=DOTS[of_up.name].function,
        ALIKE=of_gate.name == of_up.name,
        GATE_EVEN=of_gate.row_bytes(width) % 16 == 0,
        UP_EVEN=of_up.row_bytes(width) % 16 == 0,
        R=r,
        P=p,
        num_warps=tile.warps,
    )
    return sums
