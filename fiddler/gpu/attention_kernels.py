"""Triton kernels for attention over the blocks of a pool, of single rows and of tiles of rows.

Knows tensors; not the model. Kernels read positions and block tables on the device, so that one captured graph serves
every position and every sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.kv_kernels import Tables, rotate_and_store
from fiddler.gpu.kv_rows import PRODUCTS, read_rows
from fiddler.gpu.latent_kernels import LatentTiles, attend_latent, latent_tiles
from fiddler.runtime.block_pool import POSITIONS, UNIT_BYTES

__all__ = [
    "LatentTiles",
    "Tables",
    "attend_latent",
    "attend_rows",
    "attend_tiles",
    "latent_tiles",
    "rotate_and_store",
    "tiles_of",
]

_SPLITS = 16  # parts of the context that run in parallel
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend(
    q,
    keys,
    values,
    rows,
    positions,
    blocks,
    firsts,
    partial_out,
    maxima,
    sums,
    scale,
    window,
    heads,
    repeat,
    dim,
    sinks,
    SPLITS: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
):
    head = tl.program_id(0)
    split = tl.program_id(1)
    index = (tl.program_id(2).to(tl.int64) * heads + head) * SPLITS + split
    row = tl.load(rows + tl.program_id(2))
    end = tl.load(positions + row) + 1
    table = blocks + tl.load(firsts + row)
    begin = tl.maximum(end - window, 0)
    part = tl.cdiv(tl.cdiv(end - begin, SPLITS), N) * N
    first = begin + split * part
    last = tl.minimum(first + part, end)
    d = tl.arange(0, DIM)
    n = tl.arange(0, N)
    a = tl.load(q + (row * heads + head) * dim + d, mask=d < dim, other=0.0) * scale
    top = float("-inf")
    total = 0.0
    out = tl.zeros([DIM], tl.float32)
    if SINKS:  # one of the parts begins with the head's sink, as with a score whose value is 0
        top = tl.where(split == 0, tl.load(sinks + head), float("-inf"))
        total = tl.where(split == 0, 1.0, 0.0)
    for begin_n in range(first, last, N):
        pos = begin_n + n
        inside = pos < last
        block = tl.load(table + pos // P, mask=inside, other=0) * UNIT
        k = read_rows(keys, block, head // repeat, pos % P, inside, 0, d, dim, dim, P, tl.float32, True)
        v = read_rows(values, block, head // repeat, pos % P, inside, 0, d, dim, dim, P, tl.float32, True)
        score = tl.where(inside, tl.sum(k * a[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        p = tl.exp(score - new_top)
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(p, 0)
        out = out * rescale + tl.sum(p[:, None] * v, 0)
        top = new_top
    tl.store(maxima + index, top)
    tl.store(sums + index, total)
    tl.store(partial_out + index * DIM + d, out)


@triton.jit
def _merge(partial_out, maxima, sums, rows, out, heads, dim, SPLITS: tl.constexpr, DIM: tl.constexpr):
    head = tl.program_id(0)
    d = tl.arange(0, DIM)
    index = (tl.program_id(1).to(tl.int64) * heads + head) * SPLITS + tl.arange(0, SPLITS)
    top = tl.load(maxima + index)
    rescale = tl.where(top == float("-inf"), 0.0, tl.exp(top - tl.max(top, 0)))
    total = tl.sum(rescale * tl.load(sums + index), 0)
    parts = tl.load(partial_out + index[:, None] * DIM + d[None, :]) * rescale[:, None]
    row = tl.load(rows + tl.program_id(1))
    tl.store(out + (row * heads + head) * dim + d, tl.sum(parts, 0) / total, mask=d < dim)


def attend_rows(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tables,
    rows: Tensor,
    window: int | None,
    out: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Attention of some rows of q [T, H, d], each over the blocks of its sequence up to its position, into `out`.

    keys, values: see `rotate_and_store`. rows: int64 [B]; meant for sequences that have one row. sinks: float32 [H], a
    logit of each head that the softmax has beside its scores; it adds nothing to the output.
    """
    heads, dim = q.shape[1:]
    batch, splits = len(rows), max(1, _SPLITS // triton.next_power_of_2(len(rows)))
    padded_dim = max(16, triton.next_power_of_2(dim))
    partial_out = torch.empty(batch, heads, splits, padded_dim, device=q.device)
    maxima, sums = (torch.empty(batch, heads, splits, device=q.device) for _ in range(2))
    reach = (1 << 31) - 1 if window is None else window
    _attend[(heads, splits, batch)](
        q, keys, values, rows, *tables, partial_out, maxima, sums, dim**-0.5, reach, heads, heads // keys.shape[0],
        dim, q if sinks is None else sinks, splits, POSITIONS, UNIT_BYTES // keys.itemsize, 64, padded_dim,
        sinks is not None, num_warps=4,
    )  # fmt: skip
    _merge[(heads, batch)](partial_out, maxima, sums, rows, out, heads, dim, splits, padded_dim, num_warps=1)


@triton.jit
def _attend_tile(
    q,
    keys,
    values,
    tiles,
    positions,
    blocks,
    firsts,
    out,
    scale,
    window,
    heads,
    repeat,
    dim,
    sinks,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
):
    head = tl.program_id(0)
    row = tl.load(tiles + 2 * tl.program_id(1))
    count = tl.load(tiles + 2 * tl.program_id(1) + 1)
    position = tl.load(positions + row)
    table = blocks + tl.load(firsts + row)
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    d = tl.arange(0, DIM)
    q_offset = ((row + m) * heads + head)[:, None] * dim + d[None, :]
    q_mask = (m < count)[:, None] & (d < dim)[None, :]
    a = tl.load(q + q_offset, mask=q_mask, other=0.0).to(W)
    own = position + m
    end = position + count
    oldest = tl.maximum(position + 1 - window, 0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, DIM], tl.float32)
    if SINKS:
        top = tl.zeros([M], tl.float32) + tl.load(sinks + head) * _LOG2_E
        total += 1.0
    for begin in range(oldest // N * N, end, N):
        pos = begin + n
        inside = (pos >= oldest) & (pos < end)  # elsewhere a block may be given back, or not yet written
        block = tl.load(table + pos // P, mask=inside, other=0) * UNIT
        k = read_rows(keys, block, head // repeat, pos % P, inside, 0, d, dim, dim, P, W, True)
        v = read_rows(values, block, head // repeat, pos % P, inside, 0, d, dim, dim, P, W, True)
        score = tl.dot(a, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
        seen = inside[None, :] & (pos[None, :] <= own[:, None]) & (pos[None, :] > own[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen no key so far
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        result = result * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    tl.store(out + q_offset, result / total[:, None], mask=q_mask)


def tiles_of(rows: Sequence[tuple[int, int]], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Tiles of consecutive rows for `attend_tiles`, [first, count] int64 [n, 2] on the CPU, and the most rows of one.

    rows: of each sequence, the first row and how many. dtype: of products.
    """
    most = max(count for _, count in rows)
    size = 16 if most <= 16 else (64 if dtype == torch.float16 else 32)
    tiles = [
        (begin, min(size, first + count - begin))
        for first, count in rows
        for begin in range(first, first + count, size)
    ]
    return torch.tensor(tiles, dtype=torch.int64), size


def attend_tiles(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tables,
    tiles: tuple[Tensor, int],
    window: int | None,
    out: Tensor,
    dtype: torch.dtype,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention of tiles of rows of q [T, H, d], see `tiles_of`, into `out`; other arguments as `attend_rows`.

    dtype: of products, float16 or float32; sums are float32.
    """
    heads, dim = q.shape[1:]
    (rows, size), padded_dim = tiles, max(16, triton.next_power_of_2(dim))
    narrow = dtype == torch.float16 and padded_dim <= 128
    reach = (1 << 31) - 1 if window is None else window
    _attend_tile[(heads, len(rows))](
        q, keys, values, rows, *tables, out, dim**-0.5, reach, heads, heads // keys.shape[0], dim,
        q if sinks is None else sinks,  # q: not read
        POSITIONS, UNIT_BYTES // keys.itemsize, PRODUCTS[dtype], size, 64 if narrow else 32, padded_dim,
        sinks is not None, num_warps=4, num_stages=3 if narrow else 1,
    )  # fmt: skip
