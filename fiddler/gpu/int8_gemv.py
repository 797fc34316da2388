"""A Triton kernel that multiplies one token, rounded to int8, by a quantised matrix. Knows no model.

In float32 (`block_gemv`) decoding weights takes longer than reading them; integer products of 4 weights do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.int8_activations import planes_of
from fiddler.kernels.formats.triton_decoders import DOTS
from fiddler.offload.stored_matrix import StoredMatrix

__all__ = ["TILES", "Tile", "Tiles", "gemv", "int8_dots", "multiplies", "shape_of"]


class Tile(NamedTuple):
    """How a program divides its work."""

    rows: int
    """Of a thread, which loads activations once for them."""
    lanes: int
    """Threads that share a row, at most."""
    warps: int


class Tiles(NamedTuple):
    """Of a format's kernels."""

    wide: Tile
    """For rows as wide as the model."""
    long: Tile
    """For down, whose rows are the longest and the fewest."""


_TILES = Tiles(Tile(4, 128, 4), Tile(4, 128, 4))
TILES = dict.fromkeys(DOTS, _TILES) | {"q4_k": _TILES._replace(wide=Tile(4, 32, 4))}
"""By the name of the format. `tests/tools/time_quantised.py --tiles` compares some: two experts in Q4_K take 64 us on
an H200 with this tile, 69 with the other."""


@triton.jit
def int8_dots(row, a, units, planes, DOT: tl.constexpr, EVEN: tl.constexpr, R: tl.constexpr, P: tl.constexpr):
    """The products of rows at pointers [R, 1] with the activations at `a`, in parts: float32 [R, P].

    EVEN: rows begin at multiples of 16 bytes.
    """
    total, row = tl.zeros([R, P], tl.float32), row.to(tl.int64)
    for begin in range(0, units, P):
        unit = (begin + tl.arange(0, P))[None, :]
        total += tl.where(unit < units, DOT(row, tl.where(unit < units, unit, 0), a, planes, EVEN), 0.0)
    return total


@triton.jit
def _gemv(
    a,
    w,
    onto,
    y,
    rows,
    units,
    planes,
    row_bytes,
    DOT: tl.constexpr,
    EVEN: tl.constexpr,
    ONTO: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    row = w + (tl.minimum(r, rows - 1).to(tl.int64) * row_bytes)[:, None]
    dots = tl.sum(int8_dots(row, a, units, planes, DOT, EVEN, R, P), 1)
    if ONTO:
        dots += tl.load(onto + r, mask=r < rows, other=0.0)
    tl.store(y + r, dots, mask=r < rows)


def multiplies(w: StoredMatrix) -> bool:
    """Whether `gemv` takes this matrix: it loads 16 bytes at a time."""
    return w.stored.data_ptr() % 16 == 0 and w.stored.is_contiguous()


def shape_of(tile: Tile, units: int) -> tuple[int, int]:
    """Rows of a program and threads of a row, where a row has so many units."""
    lanes = min(tile.lanes, max(32, triton.next_power_of_2(units)))
    return tile.rows * max(1, tile.warps * 32 // lanes), lanes


def gemv(a: Tensor, w: StoredMatrix, onto: Tensor | None = None, tile: Tile | None = None) -> Tensor:
    """Rounded activations (`int8_activations.rounded`) . w [N, K] transposed, plus `onto`: [1, N] float32."""
    tile = tile or TILES[w.format.name].wide
    rows, columns = w.shape
    y, dot = torch.empty(1, rows, device=a.device), DOTS[w.format.name]
    r, p = shape_of(tile, columns // dot.unit)
    _gemv[(triton.cdiv(rows, r),)](
        *(a, w.stored, y if onto is None else onto, y),
        *(rows, columns // dot.unit, planes_of(columns), w.stored.shape[1]),
        DOT=dot.function,
        EVEN=w.stored.shape[1] % 16 == 0,
        ONTO=onto is not None,
        R=r,
        P=p,
        num_warps=tile.warps,
    )
    return y
