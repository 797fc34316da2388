"""Triton kernel that reads numbers in pinned host memory over PCIe. Knows addresses; not what the numbers mean.

A copy by the driver waits behind the weights that are streamed, and takes the host longer to queue than a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["add_from_host", "numbers_from_host"]


@triton.jit
def _read(source, target, count, kind: tl.constexpr, ADD: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    values = tl.load(source.to(tl.pointer_type(kind)) + at, mask=at < count, other=0)
    if ADD:
        values += tl.load(target + at, mask=at < count, other=0)
    tl.store(target + at, values, mask=at < count)


def numbers_from_host(source: int, target: Tensor) -> None:
    """Copy as many int64 as `target` has from an address of pinned memory; what a captured graph does when replayed."""
    count = target.numel()
    _read[(triton.cdiv(count, 512),)](source, target, count, tl.int64, False, 512, num_warps=4)


def add_from_host(pinned: Tensor, into: Tensor) -> None:
    """Add float32 in pinned memory to `into`, of the same shape."""
    count = into.numel()
    _read[(triton.cdiv(count, 4096),)](pinned.data_ptr(), into, count, tl.float32, True, 4096, num_warps=8)
