"""Triton kernels for attention on the GPU: rotate and store; and for one token, attend in parts side by side.

Knows tensors; not the model. The position is read on the device, so that a captured graph serves all of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["attend_one", "rotate_and_store"]

_SPLITS = 16  # parts of the context that are attended to side by side


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
    at = tl.load(position) + t
    i = tl.arange(0, PAIRS)
    inside = i < dim // 2
    if row < heads + groups:
        head = row if row < heads else row - heads
        source = (q + t * q_row if row < heads else k + t * k_row) + head * dim
        a = tl.load(source + 2 * i, mask=inside, other=0.0)
        b = tl.load(source + 2 * i + 1, mask=inside, other=0.0)
        c = tl.load(cos_sin + at * dim + 2 * i, mask=inside, other=0.0)
        s = tl.load(cos_sin + at * dim + 2 * i + 1, mask=inside, other=0.0)
        if row < heads:
            to = (t * heads + head) * dim + 2 * i
            tl.store(rotated + to, (a * c - b * s).to(rotated.dtype.element_ty), mask=inside)
            tl.store(rotated + to + 1, (a * s + b * c).to(rotated.dtype.element_ty), mask=inside)
        else:
            kept = (head * capacity + at) * dim + 2 * i
            tl.store(keys + kept, (a * c - b * s).to(keys.dtype.element_ty), mask=inside)
            tl.store(keys + kept + 1, (a * s + b * c).to(keys.dtype.element_ty), mask=inside)
    else:
        value = row - heads - groups
        stored = (value * capacity + at) * dim + 2 * i
        for half in tl.static_range(2):
            given = tl.load(v + t * v_row + value * dim + 2 * i + half, mask=inside, other=0.0)
            tl.store(values + stored + half, given.to(values.dtype.element_ty), mask=inside)


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
    """Rotate q [T, H, d] and k [T, G, d] to positions from `position`, int64 [1], on; store k and v [T, G, d] there.

    turns: float32 [positions, d / 2, 2], cosine and sine; keys, values: [G, capacity, d]. q, k, v: float32, a token's
    heads together. The rotated q, of type `dtype`.
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
    made,
    best,
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
    for at in range(first, last, N):
        seen = at + n < last
        place = base + (at + n)[:, None] * dim + d[None, :]
        mask = seen[:, None] & (d < dim)[None, :]
        k = tl.load(keys + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * a[None, :], 1), float("-inf"))
        now = tl.maximum(top, tl.max(score, 0))
        p = tl.exp(score - now)
        fade = tl.exp(top - now)
        total = total * fade + tl.sum(p, 0)
        out = out * fade + tl.sum(p[:, None] * v, 0)
        top = now
    place = head * SPLITS + split
    tl.store(best + place, top)
    tl.store(sums + place, total)
    tl.store(made + place * DIM + d, out)


@triton.jit
def _merge(made, best, sums, out, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    head = tl.program_id(0)
    d = tl.arange(0, DIM)
    place = head * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(best + place)
    fade = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.max(top, 0)))
    total = tl.sum(fade * tl.load(sums + place), 0)
    parts = tl.load(made + place[:, None] * DIM + d[None, :]) * fade[:, None]
    tl.store(out + head * dim + d, tl.sum(parts, 0) / total, mask=d < dim)


def attend_one(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, window: int | None) -> Tensor:
    """Attention of q [1, H, d] at `position`, int64 [1], over keys and values [G, capacity, d] up to there."""
    heads, dim = q.shape[1:]
    groups, capacity = keys.shape[:2]
    wide = max(16, triton.next_power_of_2(dim))
    made = torch.empty(heads, _SPLITS, wide, device=q.device)
    best, sums = (torch.empty(heads, _SPLITS, device=q.device) for _ in range(2))
    out = torch.empty_like(q)
    seen = capacity if window is None else window
    _attend[(heads, _SPLITS)](
        q, keys, values, position, made, best, sums, dim**-0.5, seen, heads // groups, capacity, dim,
        _SPLITS, 64, wide, num_warps=4,
    )  # fmt: skip
    _merge[(heads,)](made, best, sums, out, dim, _SPLITS, wide, num_warps=1)
    return out
