"""Triton kernels for several tokens of several experts at once: two launches for all experts that are on the GPU.

Knows tensors and addresses; not which weights lie where. 16-bit products with float32 sums; the plain counterpart is
`feed_forward.feed_forward`, expert by expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.files.weights import ExpertWeights
from fiddler.kernels.formats.triton_decoders import DECODERS
from fiddler.offload.activation_kernels import hidden_activation
from fiddler.offload.expert_biases import JobBiases
from fiddler.offload.expert_decode_kernels import WEIGHT_TYPES, decoded, parts_in
from fiddler.offload.feed_forward import Job
from fiddler.offload.grouped_block_kernels import down_blocks, up_blocks
from fiddler.offload.host_read_kernels import add_from_host, numbers_from_host

__all__ = ["Grouped"]

_NUMBERS = 1 << 19  # of job lists that the GPU may not have read yet


@triton.jit
def _up(
    x,
    token,
    jobs,
    blocks,
    h,
    gate_bias,
    up_bias,
    width,
    max_rows,
    base,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 7 * tl.load(block)
    rows = tl.load(job + 3)
    if tl.program_id(1) * N < rows:
        gate = tl.multiple_of(tl.load(job).to(tl.pointer_type(W)), 16)
        up = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(W)), 16)
        m = tl.load(block + 1) + tl.arange(0, M)
        valid = m < tl.load(job + 5)
        t = tl.load(token + m, mask=valid, other=0)
        n = tl.program_id(1) * N + tl.arange(0, N)
        k = tl.arange(0, K)
        row = tl.where(n < rows, n, 0)  # rows beyond the last are computed from row 0 and not stored
        a_at = x + t[:, None] * width + k[None, :]
        b_at = row[None, :] * width + k[:, None]
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
        if BIASED:
            first = tl.load(job + 6)
            g += tl.load(gate_bias + first + n, mask=n < rows, other=0.0)[None, :]
            u += tl.load(up_bias + first + n, mask=n < rows, other=0.0)[None, :]
        activated = hidden_activation(g, u, CLAMPED)
        tl.store(
            h + (m - base)[:, None] * max_rows + n[None, :], activated.to(W), mask=valid[:, None] & (n < rows)[None, :]
        )


@triton.jit
def _down(
    h,
    token,
    routing_weights,
    jobs,
    blocks,
    y,
    width,
    max_rows,
    base,
    W: tl.constexpr,
    EVEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 7 * tl.load(block)
    rows = tl.load(job + 3)
    if EVEN:
        rows = tl.multiple_of(rows, 16)
    down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(W)), 16)
    m = tl.load(block + 1) + tl.arange(0, M)
    valid = m < tl.load(job + 5)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, K)
    column = tl.where(n < width, n, 0)
    a_at = h + (m - base)[:, None] * max_rows + k[None, :]
    b_at = column[None, :] * rows + k[:, None]
    total = tl.zeros([M, N], tl.float32)
    for begin in range(0, rows, K):
        inside = begin + k < rows
        a = tl.load(a_at + begin, mask=valid[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, tl.load(down + b_at + begin, mask=inside[:, None], other=0.0), total)
    t = tl.load(token + m, mask=valid, other=0)
    routing_weight = tl.load(routing_weights + m, mask=valid, other=0.0)
    target = y + t[:, None] * width + n[None, :]
    tl.atomic_add(target, total * routing_weight[:, None], mask=valid[:, None] & (n < width)[None, :], sem="relaxed")


class _Launch(NamedTuple):
    """What the kernels of both products are handed alike."""

    token: Tensor
    jobs: Tensor  # int64 [jobs, 7]: addresses, hidden rows, first and end position, index of the first row's biases
    blocks: Tensor  # int64 [programs, 2]: a job, and a position in it
    programs: int
    max_rows: int
    base: int  # the first position
    m: int  # positions of a block
    biases: JobBiases | None


def _multiply(
    launch: _Launch, x: Tensor, h: Tensor, routing_weights: Tensor, into: Tensor, *, even: bool, clamped: bool
) -> None:
    """Both products with 16-bit weights. even: each job's hidden rows are a multiple of 16."""
    width, (n, k) = x.shape[1], (128, 64)
    token, jobs, blocks, programs, max_rows, base, m, biases = launch
    weight_type, warps = WEIGHT_TYPES[x.dtype], 8 if m > 64 else 4
    up_grid, down_grid = (programs, triton.cdiv(max_rows, n)), (programs, triton.cdiv(width, n))
    of_gate, of_up = (x, x) if biases is None else biases[:2]  # x: not read
    up = x, token, jobs, blocks, h, of_gate, of_up, width, max_rows, base, weight_type, width % k == 0
    _up[up_grid](*up, biases is not None, clamped, m, n, k, num_warps=warps, num_stages=4 if m > 64 else 3)
    down = h, token, routing_weights, jobs, blocks, into, width, max_rows, base, weight_type, even, m, n, k
    _down[down_grid](*down, num_warps=warps, num_stages=4)


def _multiply_blocks(
    launch: _Launch, x: Tensor, h: Tensor, routing_weights: Tensor, into: Tensor, weights: ExpertWeights
) -> None:
    """Both products with quantised weights."""
    width, (n, groups) = x.shape[1], (64, 2)
    token, jobs, blocks, programs, max_rows, base, m, biases = launch
    of_gate, of_up, of_down = weights.matrix_formats
    of_both = {"W": WEIGHT_TYPES[x.dtype], "M": m, "N": n, "G": groups, "num_warps": 8 if m > 64 else 4}
    row_bytes = of_gate.row_bytes(width), of_up.row_bytes(width)
    parts = {"GATE": DECODERS[of_gate.name], "UP": DECODERS[of_up.name]}
    parts |= {"BIASED": biases is not None, "CLAMPED": weights.clamped}
    gate_bias, up_bias = (x, x) if biases is None else biases[:2]  # x: not read
    up = x, token, jobs, blocks, h, gate_bias, up_bias, width, *row_bytes, max_rows, base
    up_blocks[(programs, triton.cdiv(max_rows, n))](*up, **parts, **of_both)
    stored = {"BLOCK": of_down.block_length, "BLOCK_BYTES": of_down.block_bytes}
    stored |= {"DOWN": DECODERS[of_down.name], "ALIGNED": gcd(of_down.block_bytes, 16)}
    down = h, token, routing_weights, jobs, blocks, into, width, max_rows, base
    down_blocks[(programs, triton.cdiv(width, n))](*down, **stored, **of_both)


class Grouped:
    """Computes several tokens of several experts on the GPU, without the copy engine.

    A small copy to the GPU would wait for all the weights that are being copied: kernels read pinned memory instead.
    """

    def __init__(self, device: torch.device, decoded_bytes: int = 0) -> None:
        """decoded_bytes: see `gpu_side.prompt_decode_bytes`; 0: all quantised weights are decoded into tiles."""
        self.decoded_bytes = decoded_bytes
        self.tiled = 96 if decoded_bytes >= 256 << 20 else 224  # tokens of a job whose weights are, at most
        self._decoded = torch.empty(decoded_bytes, dtype=torch.uint8, device=device)
        self._host_lists = torch.zeros(_NUMBERS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device_lists = torch.zeros(_NUMBERS, dtype=torch.int64, device=device)
        self._host_numbers = self._host_lists.numpy()
        self._next = 0  # number of the next list

    def experts_of_many(
        self,
        x: Tensor,
        token: Tensor,
        routing_weights: Tensor,
        jobs: Sequence[Job],
        max_rows: int,
        into: Tensor,
        workspace_bytes: int,
        weights: ExpertWeights,
        biases: JobBiases | None = None,
    ) -> None:
        """Add to `into` [T, D] float32, for every job and each of its tokens, the weighted feed-forward.

        x: [T, D] in the weights' type. token, routing_weights: [T * K], row of x and routing weight at each position
        in the order by expert. max_rows: no job has more. workspace_bytes: for temporaries. weights: of the layer, or
        of another one stored alike; quantised ones are decoded to x's type, into tiles or, where a job has many tokens,
        beforehand. biases: of gate and up, None for none; those of down are never added. The results of a token's jobs
        are added in any order: two give the same bits each time, three or more need not.
        """
        tokens = max(1, workspace_bytes // (x.element_size() * max_rows))
        most = self.tiled if weights.quantised and len(self._decoded) else len(token)
        tiled, many = ([job for job in jobs if (job.end - job.first > most) == more] for more in (False, True))
        for piece in _in_pieces(tiled, tokens):
            self._run(x, token, routing_weights, piece, max_rows, into, weights, biases)
        memory = self._decoded.view(x.dtype)
        for piece in _in_pieces(many, tokens):
            for parts in parts_in(piece, len(memory) // (3 * x.shape[1]), weights):
                in_16_bits = decoded(parts, weights, memory, self._to_device)
                rows = max(job.rows for job in in_16_bits)
                self._run(x, token, routing_weights, in_16_bits, rows, into, weights, biases, in_16_bits=True)

    def add_from_host(self, into: Tensor, pinned: Tensor) -> None:
        """Add pinned float32 numbers to `into`, of the same shape."""
        add_from_host(pinned, into)

    def _run(
        self,
        x: Tensor,
        token: Tensor,
        routing_weights: Tensor,
        jobs: Sequence[Job],
        max_rows: int,
        into: Tensor,
        weights: ExpertWeights,
        biases: JobBiases | None,
        *,
        in_16_bits: bool = False,
    ) -> None:
        """`experts_of_many` of a piece. in_16_bits: its weights are, whatever those of the layer."""
        base, largest = jobs[0].first, max(job.end - job.first for job in jobs)
        m = 16 if largest <= 16 else 64 if largest <= 64 else 128
        blocks = [(i, begin) for i, job in enumerate(jobs) for begin in range(job.first, job.end, m)]
        # blocks first: these are two numbers each, so that the jobs begin at a multiple of 16 bytes, too
        numbers = [number for block in blocks for number in block]
        numbers += [each for job in jobs for each in (*job.addresses, job.rows, job.first, job.end, job.biases)]
        device_list = self._to_device(numbers, x.device)
        block_list, job_list = device_list[: 2 * len(blocks)], device_list[2 * len(blocks) :]
        h = torch.empty(jobs[-1].end - base, max_rows, dtype=x.dtype, device=x.device)
        launch = _Launch(token, job_list, block_list, len(blocks), max_rows, base, m, biases)
        if weights.quantised and not in_16_bits:
            _multiply_blocks(launch, x, h, routing_weights, into, weights)
        else:
            even = all(job.rows % 16 == 0 for job in jobs)
            _multiply(launch, x, h, routing_weights, into, even=even, clamped=weights.clamped)

    def _to_device(self, numbers: list[int], device: torch.device) -> Tensor:
        """Copy int64 numbers to the GPU: lists lie one after the other, and over again when the memory is full."""
        count = len(numbers)
        if count > _NUMBERS:
            return torch.tensor(numbers).to(device, non_blocking=True)
        if self._next + count > _NUMBERS:
            self._next = 0
            if device.type == "cuda":  # the GPU must have read the lists of the last round
                torch.cuda.current_stream().synchronize()
        begin = self._next
        self._next = -(-(begin + count) // 16) * 16  # kernels know of each list that it begins at such an address
        self._host_numbers[begin : begin + count] = numbers
        device_list = self._device_lists[begin : begin + count]
        numbers_from_host(self._host_lists.data_ptr() + 8 * begin, device_list)
        return device_list


def _in_pieces(jobs: Sequence[Job], tokens: int) -> Iterator[list[Job]]:
    """The jobs in order, in pieces that span at most `tokens` positions in the order by expert."""
    piece: list[Job] = []
    for job in jobs:
        for first in range(job.first, job.end, tokens):
            part = job._replace(first=first, end=min(first + tokens, job.end))
            if piece and part.end - piece[0].first > tokens:
                yield piece
                piece = []
            piece.append(part)
    if piece:
        yield piece
