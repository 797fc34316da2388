"""Triton kernels for one token's experts. Knows tensors and addresses; not the model, nor who streams the weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.gpu.block_expert_kernels import quantised_experts_of_one
from fiddler.gpu.decode_kernels import rounded_to
from fiddler.gpu.int8_expert_kernels import int8_experts_of_one
from fiddler.offload.activation_kernels import hidden_activation
from fiddler.offload.expert_biases import JobBiases
from fiddler.offload.feed_forward import torch_type

__all__ = ["experts_of_one"]


@triton.jit
def _up(
    jobs,
    expert_ids,
    x,
    h,
    gate_bias,
    up_bias,
    width,
    max_rows,
    BY_ID: tl.constexpr,
    W: tl.constexpr,
    ROUNDED: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    j = tl.program_id(1)
    job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
    rows = tl.load(job + 3)
    r = tl.program_id(0) * R + tl.arange(0, R)
    if tl.program_id(0) * R < rows:
        gate = tl.multiple_of(tl.load(job).to(tl.pointer_type(W)), 16)
        up = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(W)), 16)
        k = tl.arange(0, K)
        g = tl.zeros([R, K], tl.float32)
        u = tl.zeros([R, K], tl.float32)
        for begin in range(0, width, K):
            inside = begin + k < width
            a = rounded_to(tl.load(x + begin + k, mask=inside, other=0.0), W, ROUNDED)[None, :]
            offset = r.to(tl.int64)[:, None] * width + (begin + k)[None, :]
            mask = (r < rows)[:, None] & inside[None, :]
            g += tl.load(gate + offset, mask=mask, other=0.0).to(tl.float32) * a
            u += tl.load(up + offset, mask=mask, other=0.0).to(tl.float32) * a
        of_gate = tl.sum(g, 1)
        of_up = tl.sum(u, 1)
        if BIASED:
            first = tl.load(job + 5)
            of_gate += tl.load(gate_bias + first + r, mask=r < rows, other=0.0)
            of_up += tl.load(up_bias + first + r, mask=r < rows, other=0.0)
        activated = hidden_activation(of_gate, of_up, CLAMPED)
        tl.store(h + j * max_rows + r, rounded_to(activated, W, ROUNDED), mask=r < rows)


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
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    W: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    total = tl.zeros([R, K], tl.float32)
    if BIASED:
        biases = tl.zeros([R], tl.float32)
    for j in range(J):
        job = jobs + 6 * (tl.load(expert_ids + j) if BY_ID else j)
        rows = tl.load(job + 3)
        if EVEN:  # else rows have no known alignment, and loads go element by element
            rows = tl.multiple_of(rows, 16)
        routing_weight = tl.load(routing_weights + (j if BY_ID else tl.load(job + 4)))
        down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(W)), 16)
        for begin in range(0, rows, K):
            inside = begin + k < rows
            a = tl.load(h + j * max_rows + begin + k, mask=inside, other=0.0)[None, :] * routing_weight
            offset = r.to(tl.int64)[:, None] * rows + (begin + k)[None, :]
            mask = (r < width)[:, None] & inside[None, :]
            total += tl.load(down + offset, mask=mask, other=0.0).to(tl.float32) * a
        if BIASED:
            of_expert = bias + tl.load(expert_ids + j) * width
            biases += tl.load(of_expert + r, mask=r < width, other=0.0) * routing_weight
    sums = tl.sum(total, 1)
    if BIASED:
        sums += biases
    if ADD:
        sums += tl.load(y + r, mask=r < width, other=0.0)
    tl.store(y + r, sums, mask=r < width)


def experts_of_one(
    x: Tensor,
    jobs: Tensor,
    routing_weights: Tensor,
    max_rows: int,
    weights: ExpertWeights,
    *,
    expert_ids: Tensor | None,
    into: Tensor,
    add: bool,
    biases: JobBiases | None = None,
) -> None:
    """Feed-forwards of one token x [1, D] float32; writes their sum, weighted by routing_weights [K], to `into` [1, D].

    jobs: int64 [n, 6]: the addresses of gate [rows, D], up [rows, D] and down [D, rows] for some hidden rows of an
    expert; the number of rows, from 0 for none to `max_rows`; the index of its routing weight; the index of the first
    row's biases. Matrices begin at multiples of 16 bytes.
    expert_ids: [K]: run jobs[expert_ids[j]] with routing weight j; None: run all jobs with the indices they hold.
    weights: of the layer whose experts these are, or of another one in the same format: how to read them, and whether
    activations are rounded to their type. into: float32. add: add to `into`. biases: None for none; those of down need
    `expert_ids`, and are added for each of them, whatever rows its job has.
    """
    assert biases is None or biases.down is None or expert_ids is not None, "whose biases of down are these?"
    if weights.quantised:
        multiply = int8_experts_of_one if weights.variant.int8_rows else quantised_experts_of_one
        multiply(
            *(x, jobs, routing_weights, max_rows, weights), expert_ids=expert_ids, into=into, add=add, biases=biases
        )
        return
    width = x.shape[1]
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[torch_type(weights)]
    rounded = weights.variant.activations == weights.format.name
    count = len(jobs) if expert_ids is None else expert_ids.numel()
    h = torch.empty(count, max_rows, device=x.device)
    by_id, ids = expert_ids is not None, jobs if expert_ids is None else expert_ids
    r, k = (2, 2048) if width > 1024 else (4, max(16, min(1024, triton.next_power_of_2(width))))
    of_gate, of_up, of_down = (x if each is None else each for each in biases or (None,) * 3)  # x: not read
    parts = {"W": kind, "ROUNDED": rounded, "BIASED": biases is not None, "CLAMPED": weights.clamped}
    _up[(triton.cdiv(max_rows, r), count)](
        jobs, ids, x, h, of_gate, of_up, width, max_rows, BY_ID=by_id, **parts, R=r, K=k, num_warps=4
    )
    r, k, warps = (4, 2048, 8) if max_rows > 4096 else (4, 512, 4)
    k = max(16, min(k, triton.next_power_of_2(max_rows)))
    _down[(triton.cdiv(width, r),)](
        *(jobs, ids, routing_weights, h, into, of_down, width, max_rows),
        BY_ID=by_id,
        ADD=add,
        EVEN=weights.gate.shape[1] % 16 == 0,
        BIASED=biases is not None and biases.down is not None,
        W=kind,
        J=count,
        R=r,
        K=k,
        num_warps=warps,
    )
