"""Triton kernels of a decode step, bound by reading weights: matrix-vector products, RMS norm, host transfers.

Knows tensors and addresses; not the model. Each has a counterpart in plain torch, which the tests compare it with,
and which runs where Triton cannot (it builds its launcher with the machine's C compiler). No kernel waits for the
host, and each reads its varying inputs from memory, so that a captured graph can be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "gemv",
    "gemv_per_head",
    "heads",
    "next_token",
    "norm",
    "rounded_to",
    "to_host_by_turns",
    "works",
]


def works(device: torch.device) -> str | None:
    """None where the kernels run on `device`; else the reason, in one line."""
    try:
        gemv(torch.ones(1, 16, device=device), torch.ones(16, 16, dtype=torch.bfloat16, device=device), rounded=True)
        torch.cuda.synchronize(device)
    except Exception as error:  # a missing compiler, driver or architecture raises anything
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


@triton.jit
def rounded_to(x, dtype: tl.constexpr, rounded: tl.constexpr):  # noqa: ANN201  # Triton's own values
    """x, rounded to `dtype` where `rounded`; as float32."""
    return x.to(dtype).to(tl.float32) if rounded else x


@triton.jit
def _gemv(x, w, onto, y, rows, width, ONTO: tl.constexpr, ROUNDED: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    total = tl.zeros([R, K], tl.float32)
    for begin in range(0, width, K):
        inside = begin + k < width
        a = rounded_to(tl.load(x + begin + k, mask=inside, other=0.0), w.dtype.element_ty, ROUNDED)
        offset = r.to(tl.int64)[:, None] * width + (begin + k)[None, :]
        b = tl.load(w + offset, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += b * a[None, :]
    dots = tl.sum(total, 1)
    if ONTO:
        dots += tl.load(onto + r, mask=r < rows, other=0.0)
    tl.store(y + r, dots, mask=r < rows)


def gemv(x: Tensor, w: Tensor, onto: Tensor | None = None, *, rounded: bool) -> Tensor:
    """x [1, K] float32, w [N, K] -> x . w transposed, plus `onto`: [1, N] float32; rounded: rounds x to w's type."""
    rows, width = w.shape
    y = torch.empty(1, rows, device=x.device)
    r, k, warps = (4, 512, 1) if rows >= 4096 else (1, 1024, 4)
    k = max(16, min(k, triton.next_power_of_2(width)))
    addend = y if onto is None else onto  # the kernel does not read y
    _gemv[(triton.cdiv(rows, r),)](x, w, addend, y, rows, width, onto is not None, rounded, r, k, num_warps=warps)
    return y


@triton.jit
def _gemv_per_head(x, w, y, rows, width, x_head, w_head, w_row, w_column, R: tl.constexpr, K: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * R + tl.arange(0, R)
    k = tl.arange(0, K)
    total = tl.zeros([R, K], tl.float32)
    for begin in range(0, width, K):
        inside = begin + k < width
        a = tl.load(x + head * x_head + begin + k, mask=inside, other=0.0)
        offset = head * w_head + r[:, None] * w_row + (begin + k)[None, :] * w_column
        total += tl.load(w + offset, mask=(r < rows)[:, None] & inside[None, :], other=0.0).to(tl.float32) * a[None, :]
    tl.store(y + head * rows + r, tl.sum(total, 1), mask=r < rows)


def gemv_per_head(x: Tensor, w: Tensor) -> Tensor:
    """x [1, H, K] float32, w [H, N, K] -> each head's x . w transposed: [1, H, N] float32. x is not rounded."""
    heads, rows, width = w.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    y = torch.empty(1, heads, rows, device=x.device)
    k = max(16, min(512, triton.next_power_of_2(width)))
    r = max(1, min(2048 // k, triton.next_power_of_2(rows)))
    grid = triton.cdiv(rows, r), heads
    _gemv_per_head[grid](x, w, y, rows, width, x.stride(1), *w.stride(), r, k, num_warps=4)
    return y


@triton.jit
def _norm(x, weight, y, width, epsilon, K: tl.constexpr):
    k = tl.arange(0, K)
    x += tl.program_id(0).to(tl.int64) * width
    y += tl.program_id(0).to(tl.int64) * width
    a = tl.load(x + k, mask=k < width, other=0.0)
    scale = tl.rsqrt(tl.sum(a * a, 0) / width + epsilon)
    tl.store(y + k, a * scale * tl.load(weight + k, mask=k < width, other=0.0), mask=k < width)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Implements `Norm`."""
    width, x = x.shape[1], x.contiguous()
    y = torch.empty_like(x)
    _norm[(len(x),)](x, weight, y, width, epsilon, triton.next_power_of_2(width), num_warps=16 if width > 1024 else 4)
    return y


@triton.jit
def _heads(
    q,
    k,
    q_norm,
    k_norm,
    q_out,
    k_out,
    q_parts,
    q_part,
    k_parts,
    k_part,
    q_row,
    k_row,
    head_dim,
    halves,
    epsilon,
    NORM: tl.constexpr,
    K: tl.constexpr,
):
    part = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    of_q = part < q_parts
    width = q_part if of_q else k_part
    index = part if of_q else part - q_parts
    i = tl.arange(0, K)
    inside = i < width
    source = q + t * q_row if of_q else k + t * k_row
    x = tl.load(source + index * width + i, mask=inside, other=0.0)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 0) / width + epsilon)
        x = x * scale * tl.load((q_norm if of_q else k_norm) + i, mask=inside, other=0.0)
    element = i % head_dim
    half = tl.maximum(halves // 2, 1)
    place = tl.where(element < halves, i - element + element % half * 2 + element // half, i)
    target = q_out + t * q_parts * q_part if of_q else k_out + t * k_parts * k_part
    tl.store(target + index * width + place, x, mask=inside)


def heads(
    q: Tensor, k: Tensor, norms: Sequence[Tensor], epsilon: float, head_dim: int, halves: int
) -> tuple[Tensor, Tensor]:
    """Implements `Heads`: one launch for queries and keys."""
    if not norms and not halves:
        return q.view(len(q), -1, head_dim), k.view(len(k), -1, head_dim)
    sizes = [len(norms[i]) if norms else head_dim for i in range(2)]
    parts = [x.shape[1] // size for x, size in zip((q, k), sizes, strict=True)]
    q_out, k_out = (torch.empty(len(x), x.shape[1] // head_dim, head_dim, device=x.device) for x in (q, k))
    q_norm, k_norm = norms if norms else (q, k)
    block = triton.next_power_of_2(max(sizes))
    _heads[(sum(parts), len(q))](
        q, k, q_norm, k_norm, q_out, k_out, parts[0], sizes[0], parts[1], sizes[1], q.stride(0), k.stride(0),
        head_dim, halves, epsilon, bool(norms), block, num_warps=1 if block <= 256 else 8,
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def _largest(logits, values, ids, size, K: tl.constexpr):
    """The largest logit of a block, not 0 behind it where one is not finite; and the first id of the largest one."""
    k = tl.program_id(0) * K + tl.arange(0, K)
    inside = k < size
    x = tl.load(logits + k, mask=inside, other=float("-inf"))
    finite = tl.max((inside & (x - x != 0.0)).to(tl.int32), 0) == 0
    x = tl.where(x == x, x, float("-inf"))
    largest = tl.max(x, 0)
    tl.store(ids + tl.program_id(0), tl.min(tl.where(inside & (x == largest), k, size), 0).to(tl.int64))
    tl.store(values + 2 * tl.program_id(0), largest)
    tl.store(values + 2 * tl.program_id(0) + 1, tl.where(finite, 0.0, 1.0))


@triton.jit
def _next_token(values, ids, token, host, blocks, size, N: tl.constexpr):
    n = tl.arange(0, N)
    inside = n < blocks
    x = tl.load(values + 2 * n, mask=inside, other=float("-inf"))
    not_finite = tl.load(values + 2 * n + 1, mask=inside, other=0.0)
    first = tl.load(ids + n, mask=inside, other=0)
    chosen = tl.min(tl.where(inside & (x == tl.max(x, 0)), first, size), 0)
    position = tl.load(token + 1)
    tl.store(host + position % 2, tl.where(tl.max(not_finite, 0) == 0.0, chosen, -1).to(tl.int64))
    tl.store(token, chosen.to(tl.int64))
    tl.store(token + 1, position + 1)


def next_token(logits: Tensor, token: Tensor, host: Tensor) -> None:
    """logits [1, V] float32; token: int64, a token id and its position. Makes them those of a greedy next step.

    host: int64 [2], pinned memory, where the new id goes to the place of the old position modulo 2, or -1 where not all
    logits are finite. The lowest id among equals; `token` is a valid one, whatever the logits are.
    """
    size = logits.shape[1]
    blocks = triton.cdiv(size, 4096)
    values = torch.empty(blocks, 2, device=logits.device)
    ids = torch.empty(blocks, dtype=torch.int64, device=logits.device)
    _largest[(blocks,)](logits, values, ids, size, 4096, num_warps=8)
    _next_token[(1,)](values, ids, token, host, blocks, size, triton.next_power_of_2(blocks), num_warps=1)


@triton.jit
def _to_host_by_turns(values, token, host, size, K: tl.constexpr):
    k = tl.program_id(0) * K + tl.arange(0, K)
    inside = k < size
    turn = (tl.load(token + 1) % 2) * size
    tl.store(host + turn + k, tl.load(values + k, mask=inside, other=0), mask=inside)


def to_host_by_turns(values: Tensor, token: Tensor, host: Tensor) -> None:
    """Copy values int64 to host[p % 2], for the position p behind a token id in `token`, before `next_token`.

    host: int64 [2, *values.shape], pinned memory.
    """
    size = values.numel()
    _to_host_by_turns[(triton.cdiv(size, 512),)](values, token, host, size, 512, num_warps=4)
