"""Triton kernels for attention: rotary embedding with KV cache writes; one token's attention, split over the context.

Knows tensors; not the model. Kernels read the position on the device, so one captured graph serves every position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_one", "rotate_and_store"]

_SPLITS = 16  # parts of the context that run in parallel


@triton.jit
def _rotate_store(
    q,
    k,
    v,
    cos_sin,
    position,
    rotated,
    keys,
    values,
    heads,
    groups,
    capacity,
    dim,
    q_row,
    k_row,
    v_row,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    t = tl.program_id(1)
    pos = tl.load(position) + t
    i = tl.arange(0, PAIRS)
    inside = i < dim // 2
    if row < heads + groups:
        head = row if row < heads else row - heads
        source = (q + t * q_row if row < heads else k + t * k_row) + head * dim
        a = tl.load(source + 2 * i, mask=inside, other=0.0)
        b = tl.load(source + 2 * i + 1, mask=inside, other=0.0)
        c = tl.load(cos_sin + pos * dim + 2 * i, mask=inside, other=0.0)
        s = tl.load(cos_sin + pos * dim + 2 * i + 1, mask=inside, other=0.0)
        if row < heads:
            q_offset = (t * heads + head) * dim + 2 * i
            tl.store(rotated + q_offset, (a * c - b * s).to(rotated.dtype.element_ty), mask=inside)
            tl.store(rotated + q_offset + 1, (a * s + b * c).to(rotated.dtype.element_ty), mask=inside)
        else:
            k_offset = (head * capacity + pos) * dim + 2 * i
            tl.store(keys + k_offset, (a * c - b * s).to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + k_offset + 1, (a * s + b * c).to(keys.dtype.element_ty), mask=inside)
    else:
        v_head = row - heads - groups
        v_offset = (v_head * capacity + pos) * dim + 2 * i
        for half in tl.static_range(2):
            element = tl.load(v + t * v_row + v_head * dim + 2 * i + half, mask=inside, other=0.0)
            tl.store(values + v_offset + half, element.to(values.dtype.element_ty), mask=inside)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    position: Tensor,
    keys: Tensor,
    values: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rotate q [T, H, d] and k [T, G, d] to T positions from `position`, int64 [1]; store k and v [T, G, d] there.

    cos_sin: float32 [positions, d / 2, 2], cosine and sine. keys, values: [G, capacity, d]. q, k, v: float32, the heads
    of a token contiguous. Returns the rotated q in `dtype`.
    """
    tokens, heads, dim = q.shape
    groups, capacity = keys.shape[:2]
    rotated = torch.empty(tokens, heads, dim, dtype=dtype, device=q.device)
    pairs = max(2, triton.next_power_of_2(dim // 2))
    _rotate_store[(heads + 2 * groups, tokens)](
        q, k, v, cos_sin, position, rotated, keys, values, heads, groups, capacity, dim,
        q.stride(0), k.stride(0), v.stride(0), pairs, num_warps=1,
    )  # fmt: skip
    return rotated


@triton.jit
def _attend(
    q,
    keys,
    values,
    position,
    partial_out,
    maxima,
    sums,
    scale,
    window,
    repeat,
    capacity,
    dim,
    SPLITS: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    end = tl.load(position) + 1
    begin = tl.maximum(end - window, 0)
    part = tl.cdiv(tl.cdiv(end - begin, SPLITS), N) * N
    first = begin + split * part
    last = tl.minimum(first + part, end)
    d = tl.arange(0, DIM)
    n = tl.arange(0, N)
    a = tl.load(q + head * dim + d, mask=d < dim, other=0.0) * scale
    base = (head // repeat).to(tl.int64) * capacity * dim
    top = float("-inf")
    total = 0.0
    out = tl.zeros([DIM], tl.float32)
    for pos in range(first, last, N):
        inside = pos + n < last
        offset = base + (pos + n)[:, None] * dim + d[None, :]
        mask = inside[:, None] & (d < dim)[None, :]
        k = tl.load(keys + offset, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + offset, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(k * a[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.exp(score - new_top)
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(p, 0)
        out = out * rescale + tl.sum(p[:, None] * v, 0)
        top = new_top
    index = head * SPLITS + split
    tl.store(maxima + index, top)
    tl.store(sums + index, total)
    tl.store(partial_out + index * DIM + d, out)


@triton.jit
def _merge(partial_out, maxima, sums, out, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    head = tl.program_id(0)
    d = tl.arange(0, DIM)
    index = head * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(maxima + index)
    rescale = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.max(top, 0)))
    total = tl.sum(rescale * tl.load(sums + index), 0)
    parts = tl.load(partial_out + index[:, None] * DIM + d[None, :]) * rescale[:, None]
    tl.store(out + head * dim + d, tl.sum(parts, 0) / total, mask=d < dim)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Attention of q [1, H, d] at `position`, int64 [1], over keys and values [G, capacity, d] up to that position."""
    heads, dim = q.shape[1:]
    groups, capacity = keys.shape[:2]
    padded_dim = max(16, triton.next_power_of_2(dim))
    partial_out = torch.empty(heads, _SPLITS, padded_dim, device=q.device)
    maxima, sums = (torch.empty(heads, _SPLITS, device=q.device) for _ in range(2))
    out = torch.empty_like(q)
    reach = capacity if window is None else window
    _attend[(heads, _SPLITS)](
        q, keys, values, position, partial_out, maxima, sums, dim**-0.5, reach, heads // groups, capacity, dim,
        _SPLITS, 64, padded_dim, num_warps=4,
    )  # fmt: skip
    _merge[(heads,)](partial_out, maxima, sums, out, dim, _SPLITS, padded_dim, num_warps=1)
    return out
