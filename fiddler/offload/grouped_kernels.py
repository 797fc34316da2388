"""Triton kernels for several tokens of several experts at once: two launches for all experts that are on the GPU.

Knows tensors and addresses; not who has which weights. 16-bit products with float32 sums; the plain counterpart is
`gpu_experts.feed_forward`, expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.offload.feed_forward import Job

__all__ = ["Grouped"]

_LISTS, _LONGEST = 1024, 512  # lists of jobs that may be under way, and the numbers of one


@triton.jit
def _up(
    x,
    token,
    jobs,
    blocks,
    h,
    width,
    most,
    base,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 6 * tl.load(block)
    rows = tl.load(job + 3)
    if tl.program_id(1) * N < rows:
        gate = tl.multiple_of(tl.load(job).to(tl.pointer_type(W)), 16)
        up = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(W)), 16)
        m = tl.load(block + 1) + tl.arange(0, M)
        mine = m < tl.load(job + 5)
        t = tl.load(token + m, mask=mine, other=0)
        n = tl.program_id(1) * N + tl.arange(0, N)
        k = tl.arange(0, K)
        here = tl.where(n < rows, n, 0)  # rows beyond are computed from another one, and not stored
        a_at = x + t[:, None] * width + k[None, :]
        b_at = here[None, :] * width + k[:, None]
        g = tl.zeros([M, N], tl.float32)
        u = tl.zeros([M, N], tl.float32)
        for begin in range(0, width, K):
            if EVEN:
                a = tl.load(a_at + begin)
                g = tl.dot(a, tl.load(gate + b_at + begin), g)
                u = tl.dot(a, tl.load(up + b_at + begin), u)
            else:
                inside = begin + k < width
                a = tl.load(a_at + begin, mask=inside[None, :], other=0.0)
                g = tl.dot(a, tl.load(gate + b_at + begin, mask=inside[:, None], other=0.0), g)
                u = tl.dot(a, tl.load(up + b_at + begin, mask=inside[:, None], other=0.0), u)
        made = g / (1 + tl.exp(-g)) * u
        tl.store(h + (m - base)[:, None] * most + n[None, :], made.to(W), mask=mine[:, None] & (n < rows)[None, :])


@triton.jit
def _down(
    h,
    token,
    routing_weights,
    jobs,
    blocks,
    y,
    width,
    most,
    base,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 6 * tl.load(block)
    rows = tl.load(job + 3)
    if EVEN:
        rows = tl.multiple_of(rows, 16)
    down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(W)), 16)
    m = tl.load(block + 1) + tl.arange(0, M)
    mine = m < tl.load(job + 5)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    here = tl.where(n < width, n, 0)
    a_at = h + (m - base)[:, None] * most + k[None, :]
    b_at = here[None, :] * rows + k[:, None]
    total = tl.zeros([M, N], tl.float32)
    for begin in range(0, rows, K):
        inside = begin + k < rows
        a = tl.load(a_at + begin, mask=mine[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, tl.load(down + b_at + begin, mask=inside[:, None], other=0.0), total)
    t = tl.load(token + m, mask=mine, other=0)
    routing_weight = tl.load(routing_weights + m, mask=mine, other=0.0)
    place = y + t[:, None] * width + n[None, :]
    tl.atomic_add(place, total * routing_weight[:, None], mask=mine[:, None] & (n < width)[None, :], sem="relaxed")


@triton.jit
def _fetch(source, target, count, kind: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    given = tl.load(source.to(tl.pointer_type(kind)) + at, mask=at < count, other=0)
    if ADD:
        given += tl.load(target + at, mask=at < count, other=0)
    tl.store(target + at, given, mask=at < count)


class Grouped:
    """What the GPU does with several tokens of several experts, all of it queued without the copy engine.

    A small copy to the GPU would wait for all the weights that are on their way there; pinned memory is read by
    kernels instead.
    """

    def __init__(self, device: torch.device) -> None:
        self._lists = torch.zeros(_LISTS, _LONGEST, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._told = torch.zeros(_LISTS, _LONGEST, dtype=torch.int64, device=device)
        self._next = 0

    def experts_of_many(
        self, x: Tensor, token: Tensor, routing_weights: Tensor, jobs: Sequence[Job], most: int, into: Tensor, work: int
    ) -> None:
        """Add to `into` [T, D] float32, for every job and each of its tokens, that token's share of the feed-forward.

        x: [T, D] in the weights' type. token, shares: [A], the row of x and the share of each place in the order by
        expert. most: no job has more rows. work: bytes for temporaries. The sums of a token's jobs come in any order:
        two give the same bits each time, three or more need not.
        """
        for part in _in_pieces(jobs, max(1, work // (2 * most))):
            self._run(x, token, routing_weights, part, most, into)

    def add_from_host(self, into: Tensor, given: Tensor) -> None:
        """Add pinned float32 numbers to `into`, of the same shape."""
        count = into.numel()
        _fetch[(triton.cdiv(count, 4096),)](given.data_ptr(), into, count, tl.float32, True, 4096, num_warps=8)

    def _run(
        self, x: Tensor, token: Tensor, routing_weights: Tensor, jobs: Sequence[Job], most: int, into: Tensor
    ) -> None:
        width, base = x.shape[1], jobs[0].first
        largest = max(job.end - job.first for job in jobs)
        m = 16 if largest <= 16 else 64 if largest <= 64 else 128
        blocks = [(i, begin) for i, job in enumerate(jobs) for begin in range(job.first, job.end, m)]
        listed = [number for job in jobs for number in (*job.addresses, job.rows, job.first, job.end)]
        told = self._tell(listed + [number for block in blocks for number in block], x.device)
        given, at = told[: 6 * len(jobs)], told[6 * len(jobs) :]
        kind = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
        h = torch.empty(jobs[-1].end - base, most, dtype=x.dtype, device=x.device)
        n, k = 128, 64
        warps, stages = (8, 4) if m > 64 else (4, 3)
        _up[(len(blocks), triton.cdiv(most, n))](
            x, token, given, at, h, width, most, base, kind, width % k == 0, m, n, k, num_warps=warps, num_stages=stages
        )
        even = all(job.rows % 16 == 0 for job in jobs)
        _down[(len(blocks), triton.cdiv(width, n))](
            h,
            token,
            routing_weights,
            given,
            at,
            into,
            width,
            most,
            base,
            kind,
            even,
            m,
            n,
            k,
            num_warps=warps,
            num_stages=4,
        )

    def _tell(self, numbers: list[int], device: torch.device) -> Tensor:
        """Numbers on the GPU."""
        count = len(numbers)
        if count > _LONGEST:
            return torch.tensor(numbers).to(device, non_blocking=True)
        index, self._next = self._next, (self._next + 1) % _LISTS
        if index == 0 and device.type == "cuda":  # the lists of the last round must have been read
            torch.cuda.current_stream().synchronize()
        self._lists[index].numpy()[:count] = numbers
        told = self._told[index, :count]
        _fetch[(1,)](self._lists[index].data_ptr(), told, count, tl.int64, False, _LONGEST, num_warps=4)
        return told


def _in_pieces(jobs: Sequence[Job], tokens: int) -> Iterator[list[Job]]:
    """The jobs in turn, with at most so many tokens between the first and the last of a piece."""
    piece: list[Job] = []
    for job in jobs:
        for first in range(job.first, job.end, tokens):
            taken = job._replace(first=first, end=min(first + tokens, job.end))
            if piece and taken.end - piece[0].first > tokens:
                yield piece
                piece = []
            piece.append(taken)
    if piece:
        yield piece
