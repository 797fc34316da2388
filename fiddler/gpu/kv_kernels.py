"""A Triton kernel that rotates queries and keys, and writes keys and values to the blocks of a pool.

Knows tensors; not the model. It reads positions and block tables on the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.kv_rows import write_pairs
from fiddler.runtime.block_pool import POSITIONS, UNIT_BYTES

__all__ = ["Tables", "rotate_and_store"]


class Tables(NamedTuple):
    """Where the rows of a step stand, on the GPU.

    `positions`: int64 [T]. `blocks`: int64, the block tables of all sequences one after the other, as `offsets` of the
    pool. `firsts`: int64 [T], where in `blocks` the table of a row's sequence begins.
    """

    positions: Tensor
    blocks: Tensor
    firsts: Tensor


@triton.jit
def _rotate_store(
    q,
    k,
    v,
    cos_sin,
    positions,
    blocks,
    firsts,
    rotated,
    keys,
    values,
    heads,
    groups,
    dim,
    turned,
    q_row,
    k_row,
    v_row,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    PAIRS: tl.constexpr,
):
    row = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64)
    pos = tl.load(positions + t)
    i = tl.arange(0, PAIRS)
    inside = i < dim // 2
    block = tl.load(blocks + tl.load(firsts + t) + pos // P) * UNIT
    if row < heads + groups:
        head = row if row < heads else row - heads
        source = (q + t * q_row if row < heads else k + t * k_row) + head * dim
        a = tl.load(source + 2 * i, mask=inside, other=0.0)
        b = tl.load(source + 2 * i + 1, mask=inside, other=0.0)
        c = tl.load(cos_sin + pos * turned + 2 * i, mask=i < turned // 2, other=1.0)
        s = tl.load(cos_sin + pos * turned + 2 * i + 1, mask=i < turned // 2, other=0.0)
        if row < heads:
            q_offset = (t * heads + head) * dim + 2 * i
            tl.store(rotated + q_offset, a * c - b * s, mask=inside)
            tl.store(rotated + q_offset + 1, a * s + b * c, mask=inside)
        else:
            write_pairs(keys, block, head, pos % P, a * c - b * s, a * s + b * c, i, inside, dim, P)
    else:
        v_head = row - heads - groups
        v_source = v + t * v_row + v_head * dim + 2 * i
        x = tl.load(v_source, mask=inside, other=0.0)
        y = tl.load(v_source + 1, mask=inside, other=0.0)
        write_pairs(values, block, v_head, pos % P, x, y, i, inside, dim, P)


def rotate_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, tables: Tables, keys: Tensor, values: Tensor | None
) -> Tensor:
    """Rotate q [T, H, d] and k [T, G, d] to the rows' positions; store k and v [T, G, d] in the rows' blocks.

    cos_sin: float32 [positions, ..., pairs, 2], cosine and sine of a head's first pairs; the others are not rotated.
    keys, values: a layer's in the pool's first block, [G, *layout.shape]; None: v is not stored. q, k, v: float32, the
    heads of a token contiguous. Returns the rotated q, float32.
    """
    tokens, heads, dim = q.shape
    groups = keys.shape[0]
    rotated = torch.empty(tokens, heads, dim, device=q.device)
    pairs = max(2, triton.next_power_of_2(dim // 2))
    fused = {"enable_fp_fusion": False} if keys.dtype == torch.uint8 else {}  # else codes would not be those of a CPU
    _rotate_store[(heads + (1 if values is None else 2) * groups, tokens)](
        q, k, v, cos_sin, *tables, rotated, keys, keys if values is None else values, heads, groups, dim,
        2 * cos_sin.shape[-2], q.stride(0), k.stride(0), v.stride(0), POSITIONS, UNIT_BYTES // keys.itemsize, pairs,
        num_warps=1, **fused,
    )  # fmt: skip
    return rotated
