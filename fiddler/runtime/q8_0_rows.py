"""Keys and values as blocks of Q8_0, in torch on any device: 32 numbers as a float16 scale and 32 int8 codes.

As `gguf.quants.Q8_0`, in every bit. Knows rows of numbers; no caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "decoded", "encoded", "row_bytes"]

BLOCK = 32
"""Numbers that share a scale."""
_BYTES = 34


def row_bytes(head_dim: int) -> int:
    """Size of `head_dim` numbers [bytes]: whole blocks."""
    assert head_dim % BLOCK == 0
    return head_dim // BLOCK * _BYTES


def encoded(rows: Tensor) -> Tensor:
    """Floats [..., head_dim] as bytes, uint8 [..., row_bytes]."""
    blocks = rows.float().reshape(*rows.shape[:-1], -1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    scaled = blocks * torch.where(scales == 0, 0.0, 1 / scales)
    magnitude = scaled.abs().floor()
    magnitude += (2 * (scaled.abs() - magnitude)).floor()  # half away from zero
    # what is no number has a scale that is none; its codes mean nothing
    codes = torch.nan_to_num(magnitude, 0.0, 127.0).clamp(max=127).copysign(scaled).to(torch.int8)
    return torch.cat([scales.half().view(torch.uint8), codes.view(torch.uint8)], -1).flatten(-2)


def decoded(stored: Tensor) -> Tensor:
    """The opposite: float32 [..., head_dim]."""
    blocks = stored.reshape(*stored.shape[:-1], -1, _BYTES)
    scales = blocks[..., :2].contiguous().view(torch.float16).float()
    return (scales * blocks[..., 2:].contiguous().view(torch.int8).float()).flatten(-2)
