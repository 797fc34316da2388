"""A Triton kernel that multiplies one token by a quantised matrix, decoded in registers. Knows no model."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.kernels.formats.block_format import GROUP
from fiddler.kernels.formats.triton_decoders import DECODERS
from fiddler.kernels.formats.weight_format import WeightFormat

__all__ = ["floats_at", "gemv", "tile"]


@triton.jit
def floats_at(x, group, lane, groups):
    """The float32 numbers of groups of 32, [1, G, 32]; beyond the last group 0."""
    return tl.load(x + group[:, :, None] * 32 + lane[None, None, :], mask=(group < groups)[:, :, None], other=0.0)


@triton.jit
def _gemv(
    x,
    w,
    onto,
    y,
    rows,
    groups,
    row_bytes,
    DECODE: tl.constexpr,
    ONTO: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    row = w + (r.to(tl.int64) * row_bytes)[:, None]
    lane = tl.arange(0, 32)
    total = tl.zeros([R, G, 32], tl.float32)
    for begin in range(0, groups, G):
        group = (begin + tl.arange(0, G))[None, :]
        total += DECODE(row, group, lane, (r < rows)[:, None] & (group < groups)) * floats_at(x, group, lane, groups)
    dots = tl.sum(tl.sum(total, 2), 1)
    if ONTO:
        dots += tl.load(onto + r, mask=r < rows, other=0.0)
    tl.store(y + r, dots, mask=r < rows)


def tile(columns: int) -> tuple[int, int]:
    """Rows and groups of 32 columns that a program of 4 warps decodes at once."""
    groups = triton.next_power_of_2(columns // GROUP)
    return (4, max(1, groups)) if groups < 32 else (2, 32)


def gemv(x: Tensor, stored: Tensor, kind: WeightFormat, onto: Tensor | None = None) -> Tensor:
    """x [1, K] float32 . a matrix [N, K] transposed, plus `onto`: [1, N] float32. stored: uint8 [N, bytes of a row]."""
    rows, row_bytes = stored.shape
    y = torch.empty(1, rows, device=x.device)
    r, g = tile(x.shape[1])
    _gemv[(triton.cdiv(rows, r),)](
        x,
        stored,
        y if onto is None else onto,  # the kernel does not read y
        y,
        rows,
        x.shape[1] // GROUP,
        row_bytes,
        DECODE=DECODERS[kind.name],
        ONTO=onto is not None,
        R=r,
        G=g,
        num_warps=4,
    )
    return y
