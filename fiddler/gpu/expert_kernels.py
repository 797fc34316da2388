"""Triton kernels for one token's experts on the GPU. Knows tensors and addresses; not the model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.decode_kernels import rounded_to

__all__ = ["experts_of_one"]


@triton.jit
def _up(
    jobs,
    expert_ids,
    x,
    h,
    width,
    most,
    BY_ID: tl.constexpr,
    W: tl.constexpr,
    ROUNDED: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    j = tl.program_id(1)
    job = jobs + 5 * (tl.load(expert_ids + j) if BY_ID else j)
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
            at = r.to(tl.int64)[:, None] * width + (begin + k)[None, :]
            mask = (r < rows)[:, None] & inside[None, :]
            g += tl.load(gate + at, mask=mask, other=0.0).to(tl.float32) * a
            u += tl.load(up + at, mask=mask, other=0.0).to(tl.float32) * a
        total = tl.sum(g, 1)
        made = total / (1 + tl.exp(-total)) * tl.sum(u, 1)
        tl.store(h + j * most + r, rounded_to(made, W, ROUNDED), mask=r < rows)


@triton.jit
def _down(
    jobs,
    expert_ids,
    routing_weights,
    h,
    y,
    width,
    most,
    BY_ID: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    W: tl.constexpr,
    J: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    total = tl.zeros([R, K], tl.float32)
    for j in range(J):
        job = jobs + 5 * (tl.load(expert_ids + j) if BY_ID else j)
        rows = tl.load(job + 3)
        if EVEN:  # else every row might begin anywhere, and be read element by element
            rows = tl.multiple_of(rows, 16)
        routing_weight = tl.load(routing_weights + (j if BY_ID else tl.load(job + 4)))
        down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(W)), 16)
        for begin in range(0, rows, K):
            inside = begin + k < rows
            a = tl.load(h + j * most + begin + k, mask=inside, other=0.0)[None, :] * routing_weight
            at = r.to(tl.int64)[:, None] * rows + (begin + k)[None, :]
            mask = (r < width)[:, None] & inside[None, :]
            total += tl.load(down + at, mask=mask, other=0.0).to(tl.float32) * a
    made = tl.sum(total, 1)
    if ADD:
        made += tl.load(y + r, mask=r < width, other=0.0)
    tl.store(y + r, made, mask=r < width)


def experts_of_one(
    x: Tensor,
    jobs: Tensor,
    routing_weights: Tensor,
    most: int,
    dtype: torch.dtype,
    *,
    expert_ids: Tensor | None,
    into: Tensor,
    add: bool,
    rounded: bool,
    even: bool,
) -> None:
    """Feed-forwards of one token, x [1, D] float32 -> their sum, weighted by `routing_weights` [K], `into` [1, D] float32.

    jobs: int64 [n, 5]: the addresses of gate [rows, D], up [rows, D] and down [D, rows]
    of some hidden rows of an expert, the number of rows, at most `most`, 0 for none, and whose share it gets.
    ids: [K]; then job ids[j] is done for share j, else all jobs with the shares that they name. `dtype`: of the
    weights; `rounded`: activations to that type; `add`: to what `into` holds. `even`:
    every job's number of rows is a multiple of 16. Matrices begin at multiples of 16 bytes.
    """
    width = x.shape[1]
    kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    count = len(jobs) if expert_ids is None else expert_ids.numel()
    h = torch.empty(count, most, device=x.device)
    by_id, given = expert_ids is not None, jobs if expert_ids is None else expert_ids
    r, k = (2, 2048) if width > 1024 else (4, max(16, min(1024, triton.next_power_of_2(width))))
    _up[(triton.cdiv(most, r), count)](
        jobs, given, x, h, width, most, BY_ID=by_id, W=kind, ROUNDED=rounded, R=r, K=k, num_warps=4
    )
    r, k, warps = (4, 2048, 8) if most > 4096 else (4, 512, 4)
    k = max(16, min(k, triton.next_power_of_2(most)))
    _down[(triton.cdiv(width, r),)](
        jobs,
        given,
        routing_weights,
        h,
        into,
        width,
        most,
        BY_ID=by_id,
        ADD=add,
        EVEN=even,
        W=kind,
        J=count,
        R=r,
        K=k,
        num_warps=warps,
    )
