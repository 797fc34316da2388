"""Triton kernels for one token's quantised experts, decoded in registers. Knows addresses; not who streams the weights.

`expert_kernels` has those of 16-bit experts, and says what the arguments are.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.gpu.block_gemv import floats_at, tile
from fiddler.kernels.formats.block_format import GROUP
from fiddler.kernels.formats.triton_decoders import DECODERS
from fiddler.offload.activation_kernels import hidden_activation
from fiddler.offload.expert_biases import JobBiases

__all__ = ["quantised_experts_of_one"]


@triton.jit
def _up(
    jobs,
    expert_ids,
    x,
    h,
    gate_bias,
    up_bias,
    groups,
    gate_bytes,
    up_bytes,
    max_rows,
    BY_ID: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    j = tl.program_id(1)
    job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
    rows = tl.load(job + 3)
    r = tl.program_id(0) * R + tl.arange(0, R)
    if tl.program_id(0) * R < rows:
        gate = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.uint8)), 16)
        up = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(tl.uint8)), 16)
        gate_row = gate + (r.to(tl.int64) * gate_bytes)[:, None]
        up_row = up + (r.to(tl.int64) * up_bytes)[:, None]
        lane = tl.arange(0, 32)
        g = tl.zeros([R, G, 32], tl.float32)
        u = tl.zeros([R, G, 32], tl.float32)
        for begin in range(0, groups, G):
            group = (begin + tl.arange(0, G))[None, :]
            a = floats_at(x, group, lane, groups)
            mask = (r < rows)[:, None] & (group < groups)
            g += GATE(gate_row, group, lane, mask) * a
            u += UP(up_row, group, lane, mask) * a
        of_gate = tl.sum(tl.sum(g, 2), 1)
        of_up = tl.sum(tl.sum(u, 2), 1)
        if BIASED:
            first = tl.load(job + 5)
            of_gate += tl.load(gate_bias + first + r, mask=r < rows, other=0.0)
            of_up += tl.load(up_bias + first + r, mask=r < rows, other=0.0)
        tl.store(h + j * max_rows + r, hidden_activation(of_gate, of_up, CLAMPED), mask=r < rows)


@triton.jit
def _down(
    jobs,
    expert_ids,
    routing_weights,
    h,
    y,
    bias,
    width,
    max_rows,
    BY_ID: tl.constexpr,
    ADD: tl.constexpr,
    BIASED: tl.constexpr,
    DOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    lane = tl.arange(0, 32)
    total = tl.zeros([R, G, 32], tl.float32)
    if BIASED:
        biases = tl.zeros([R], tl.float32)
    for j in range(J):
        job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
        rows = tl.load(job + 3).to(tl.int32)
        groups = rows // 32
        routing_weight = tl.load(routing_weights + (j if BY_ID else tl.load(job + 4)))
        down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(tl.uint8)), 16)
        row_bytes = tl.multiple_of(rows // BLOCK * BLOCK_BYTES, ALIGNED)
        down_row = down + (r.to(tl.int64) * row_bytes)[:, None]
        for begin in range(0, groups, G):
            group = (begin + tl.arange(0, G))[None, :]
            a = floats_at(h + j * max_rows, group, lane, groups) * routing_weight
            total += DOWN(down_row, group, lane, (r < width)[:, None] & (group < groups)) * a
        if BIASED:
            of_expert = bias + tl.load(expert_ids + j) * width
            biases += tl.load(of_expert + r, mask=r < width, other=0.0) * routing_weight
    sums = tl.sum(tl.sum(total, 2), 1)
    if BIASED:
        sums += biases
    if ADD:
        sums += tl.load(y + r, mask=r < width, other=0.0)
    tl.store(y + r, sums, mask=r < width)


def quantised_experts_of_one(
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
    """`expert_kernels.experts_of_one` for quantised experts, in float32.

    The rows of each job are whole blocks of down.
    """
    width = x.shape[1]
    of_gate, of_up, of_down = weights.matrix_formats
    count = len(jobs) if expert_ids is None else expert_ids.numel()
    h = torch.empty(count, max_rows, device=x.device)
    by_id, ids = expert_ids is not None, jobs if expert_ids is None else expert_ids
    gate_bias, up_bias, down_bias = (x if each is None else each for each in biases or (None,) * 3)  # x: not read
    r, g = tile(width)
    _up[(triton.cdiv(max_rows, r), count)](
        *(jobs, ids, x, h, gate_bias, up_bias),
        *(width // GROUP, of_gate.row_bytes(width), of_up.row_bytes(width), max_rows),
        BY_ID=by_id,
        GATE=DECODERS[of_gate.name],
        UP=DECODERS[of_up.name],
        BIASED=biases is not None,
        CLAMPED=weights.clamped,
        R=r,
        G=g,
        num_warps=4,
    )
    r, g = tile(max_rows)
    _down[(triton.cdiv(width, r),)](
        *(jobs, ids, routing_weights, h, into, down_bias, width, max_rows),
        BY_ID=by_id,
        ADD=add,
        BIASED=biases is not None and biases.down is not None,
        DOWN=DECODERS[of_down.name],
        BLOCK=of_down.block_length,
        BLOCK_BYTES=of_down.block_bytes,
        ALIGNED=gcd(of_down.block_bytes, 16),
        J=count,
        R=r,
        G=g,
        num_warps=4,
    )
