"""Triton kernels for several tokens of several quantised experts at once: weights are decoded into 16-bit tiles.

Knows addresses and decoders. `grouped_kernels` launches them, has those of 16-bit experts, and says what goes in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fiddler.offload.activation_kernels import hidden_activation

__all__ = ["down_blocks", "up_blocks"]


@triton.jit
def _tile(DECODE: tl.constexpr, row, begin, groups, W: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Columns of G groups from group `begin` on, of N rows at these addresses: [32 * G, N] in the type W."""
    group = (begin + tl.arange(0, G))[None, :]
    inside = (group < groups) & tl.full([N, 1], True, tl.int1)
    values = DECODE(row[:, None], group, tl.arange(0, 32), inside)
    return tl.trans(tl.reshape(values.to(W), [N, 32 * G]))


@triton.jit
def up_blocks(
    x,
    token,
    jobs,
    blocks,
    h,
    gate_bias,
    up_bias,
    width,
    gate_bytes,
    up_bytes,
    max_rows,
    base,
    W: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    BIASED: tl.constexpr,
    CLAMPED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
):
    """The hidden activations of each block's tokens and N hidden rows, into h."""
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 7 * tl.load(block)
    rows = tl.load(job + 3)
    if tl.program_id(1) * N < rows:
        gate = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.uint8)), 16)
        up = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(tl.uint8)), 16)
        m = tl.load(block + 1) + tl.arange(0, M)
        valid = m < tl.load(job + 5)
        t = tl.load(token + m, mask=valid, other=0)
        n = tl.program_id(1) * N + tl.arange(0, N)
        k = tl.arange(0, 32 * G)
        row = tl.where(n < rows, n, 0).to(tl.int64)  # rows beyond the last are computed from row 0 and not stored
        a_at = x + t[:, None] * width + k[None, :]
        g = tl.zeros([M, N], tl.float32)
        u = tl.zeros([M, N], tl.float32)
        groups = width // 32
        for begin in range(0, groups, G):
            a = tl.load(a_at + begin * 32, mask=(begin * 32 + k < width)[None, :], other=0.0)
            g = tl.dot(a, _tile(GATE, gate + row * gate_bytes, begin, groups, W, N, G), g)
            u = tl.dot(a, _tile(UP, up + row * up_bytes, begin, groups, W, N, G), u)
        if BIASED:
            first = tl.load(job + 6)
            g += tl.load(gate_bias + first + n, mask=n < rows, other=0.0)[None, :]
            u += tl.load(up_bias + first + n, mask=n < rows, other=0.0)[None, :]
        activated = hidden_activation(g, u, CLAMPED)
        tl.store(
            h + (m - base)[:, None] * max_rows + n[None, :], activated.to(W), mask=valid[:, None] & (n < rows)[None, :]
        )


@triton.jit
def down_blocks(
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
    DOWN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
):
    """Adds routing weight * down . h of each block's tokens, for N columns of y."""
    block = blocks + 2 * tl.program_id(0)
    job = jobs + 7 * tl.load(block)
    rows = tl.load(job + 3).to(tl.int32)
    down = tl.multiple_of(tl.load(job + 2).to(tl.pointer_type(tl.uint8)), 16)
    m = tl.load(block + 1) + tl.arange(0, M)
    valid = m < tl.load(job + 5)
    n = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, 32 * G)
    row_bytes = tl.multiple_of(rows // BLOCK * BLOCK_BYTES, ALIGNED)
    down_row = down + tl.where(n < width, n, 0).to(tl.int64) * row_bytes
    a_at = h + (m - base)[:, None] * max_rows + k[None, :]
    total = tl.zeros([M, N], tl.float32)
    groups = rows // 32
    for begin in range(0, groups, G):
        inside = (begin * 32 + k < rows)[None, :]
        a = tl.load(a_at + begin * 32, mask=valid[:, None] & inside, other=0.0)
        total = tl.dot(a, _tile(DOWN, down_row, begin, groups, W, N, G), total)
    t = tl.load(token + m, mask=valid, other=0)
    routing_weight = tl.load(routing_weights + m, mask=valid, other=0.0)
    target = y + t[:, None] * width + n[None, :]
    tl.atomic_add(target, total * routing_weight[:, None], mask=valid[:, None] & (n < width)[None, :], sem="relaxed")
