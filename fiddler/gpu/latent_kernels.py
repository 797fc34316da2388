"""Triton kernels of latent attention in its absorbed form, over the blocks of a pool.

Knows tensors; not the model. All heads attend to one vector a position, whose first elements are the rotated key, and
whose others are both key and value. So a tile of rows is heads of the same positions, and reads each vector once: for a
single token as for a prompt. Kernels read positions and block tables on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.kv_kernels import Tables
from fiddler.gpu.kv_rows import PRODUCTS, read_rows
from fiddler.runtime.block_pool import POSITIONS, UNIT_BYTES

__all__ = ["LatentTiles", "attend_latent", "latent_tiles"]

_PROGRAMS = 128  # that run in parallel: the context is divided into parts where tiles are fewer
_MOST_SPLITS = 32
_LOG2_E = tl.constexpr(1.4426950408889634)


class LatentTiles(NamedTuple):
    """Tiles of rows of q [T * H, d]: `bounds` int64 [n, 2], the first row and how many; `size`, the most of one."""

    bounds: Tensor
    size: int


@triton.jit
def _attend_latent(
    q,
    keys,
    tiles,
    positions,
    blocks,
    firsts,
    out,
    maxima,
    sums,
    scale,
    heads,
    rotated,
    dim,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    ALONE: tl.constexpr,
    WHOLE: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    first_row = tl.load(tiles + 2 * tile)
    count = tl.load(tiles + 2 * tile + 1)
    token = first_row // heads
    position = tl.load(positions + token)
    table = blocks + tl.load(firsts + token)
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    r = tl.arange(0, R)
    latent = tl.arange(0, L)
    width = dim - rotated
    own = position + (first_row + m) // heads - token
    end = position + (first_row + count - 1) // heads - token + 1
    row = (first_row + m)[:, None] * dim
    inside_m = (m < count)[:, None]
    q_rotated = tl.load(q + row + r[None, :], mask=inside_m & (r < rotated)[None, :], other=0.0)
    q_latent = tl.load(q + row + rotated + latent[None, :], mask=inside_m & (latent < width)[None, :], other=0.0)
    # a query multiplied by its head's matrix may exceed 16 bits: its largest element is 1 in the products
    size = tl.maximum(tl.max(tl.abs(q_rotated), 1), tl.max(tl.abs(q_latent), 1))
    size = tl.where(size > 0.0, size, 1.0)
    q_rotated = (q_rotated / size[:, None]).to(W)
    if C == L:
        q_latent = (q_latent / size[:, None]).to(W)
    factor = size * (scale * _LOG2_E)
    part = tl.cdiv(tl.cdiv(end, splits), N) * N
    begin = split * part
    last = tl.minimum(begin + part, end)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, L], tl.float32)
    for begin_n in range(begin, last, N):
        pos = begin_n + n
        inside = pos < last
        block = tl.load(table + pos // P, mask=inside, other=0) * UNIT
        k_rotated = read_rows(keys, block, 0, pos % P, inside, 0, r, rotated, dim, P, W, WHOLE)
        k_latent = read_rows(keys, block, 0, pos % P, inside, rotated, latent, width, dim, P, W, WHOLE)
        score = tl.dot(q_rotated, tl.trans(k_rotated), input_precision="ieee")
        if C == L:
            score = tl.dot(q_latent, tl.trans(k_latent), score, input_precision="ieee")
        else:  # without tensor cores each thread's registers hold the rows that it multiplies
            for begin_c in range(0, L, C):
                c = begin_c + tl.arange(0, C)
                a = tl.load(q + row + rotated + c[None, :], mask=inside_m & (c < width)[None, :], other=0.0)
                after = rotated + begin_c
                b = read_rows(keys, block, 0, pos % P, inside, after, tl.arange(0, C), dim - after, dim, P, W, WHOLE)
                score = tl.dot(a / size[:, None], tl.trans(b), score, input_precision="ieee")
        score *= factor[:, None]
        score = tl.where(inside[None, :] & (pos[None, :] <= own[:, None]), score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # of a row that has seen no key so far
        p = tl.exp2(score - shift[:, None])
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(p, 1)
        result = tl.dot(p.to(k_latent.dtype), k_latent, result * rescale[:, None], input_precision="ieee")
        top = new_top
    if ALONE:
        y = out + row + rotated + latent[None, :]
        tl.store(y, result / total[:, None], mask=inside_m & (latent < width)[None, :])
    else:
        index = (tile * splits + split) * M + m
        tl.store(maxima + index, top)
        tl.store(sums + index, total)
        tl.store(out + index[:, None] * L + latent[None, :], result, mask=(top > float("-inf"))[:, None])


@triton.jit
def _merge_latent(
    parts, maxima, sums, tiles, out, rotated, dim, SPLITS: tl.constexpr, M: tl.constexpr, L: tl.constexpr
):
    tile = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0)
    if m < tl.load(tiles + 2 * tile + 1):
        latent = tl.arange(0, L)
        index = (tile * SPLITS + tl.arange(0, SPLITS)) * M + m
        top = tl.load(maxima + index)
        seen = top != float("-inf")  # else the part has no positions, and was not written
        rescale = tl.where(seen, tl.exp2(top - tl.max(top, 0)), 0.0)
        total = tl.sum(rescale * tl.load(sums + index), 0)
        values = tl.load(parts + index[:, None] * L + latent[None, :], mask=seen[:, None], other=0.0)
        row = tl.load(tiles + 2 * tile) + m
        y = tl.sum(values * rescale[:, None], 0) / total
        tl.store(out + row * dim + rotated + latent, y, mask=latent < dim - rotated)


def latent_tiles(rows: Sequence[tuple[int, int]], heads: int, dtype: torch.dtype) -> LatentTiles:
    """Tiles, on the CPU, of the heads of consecutive tokens: of each sequence the first token's row, and how many.

    dtype: of products.
    """
    most = max(count for _, count in rows) * heads
    size = 16 if most <= 16 or dtype == torch.float32 else 32
    bounds = []
    for first, count in rows:
        begins = np.arange(first * heads, (first + count) * heads, size)
        bounds.append(np.stack([begins, np.minimum(size, (first + count) * heads - begins)], 1))
    return LatentTiles(torch.from_numpy(np.concatenate(bounds)), size)


def attend_latent(
    q: Tensor, keys: Tensor, tables: Tables, tiles: LatentTiles, rotated: int, out: Tensor, dtype: torch.dtype
) -> None:
    """Causal latent attention of tiles of rows of q [T, H, d], into the same rows of `out` [T, H, d], float32.

    keys: a layer's in the pool's first block, [1, *layout.shape], of each position the rotated key [rotated] and the
    latent. Writes the weighted sums of the latents, out[..., rotated:], alone. dtype: of products, float16 or float32;
    sums are float32. Scores are divided by the root of d.
    """
    heads, dim = q.shape[1:]
    count, size = len(tiles.bounds), tiles.size
    r, latent = (max(16, triton.next_power_of_2(each)) for each in (rotated, dim - rotated))
    splits = max(1, min(_MOST_SPLITS, _PROGRAMS // triton.next_power_of_2(count)))
    parts, maxima, sums = out, out, out
    if splits > 1:
        parts = torch.empty(count, splits, size, latent, device=q.device)
        maxima, sums = (torch.empty(count, splits, size, device=q.device) for _ in range(2))
    # positions at once, and warps: Q8_0 is decoded in registers, which must suffice
    quantised = keys.dtype == torch.uint8
    n, warps = 16 if quantised and size == 32 else 32, 8 if quantised or size == 32 else 4
    c, stages = latent, 2
    if dtype == torch.float32:
        n, c, stages, warps = 16, min(latent, 32), 1, 8
    _attend_latent[(count, splits)](
        q, keys, tiles.bounds, *tables, parts, maxima, sums, dim**-0.5, heads, rotated, dim, POSITIONS,
        UNIT_BYTES // keys.itemsize, splits == 1, rotated % 32 == 0, PRODUCTS[dtype], size, n, r, latent, c,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if splits > 1:
        _merge_latent[(size, count)](
            parts, maxima, sums, tiles.bounds, out, rotated, dim, splits, size, latent, num_warps=4
        )
