"""Keys and values as blocks of Q8_0, in torch on any device: 32 numbers as a float16 scale and 32 int8 codes.

As `gguf.quants.Q8_0`, in every bit. Knows rows of numbers; no caches.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["BLOCK", "codes_and_scales", "decoded", "encoded", "row_bytes", "values_of"]

BLOCK = 32
"""Numbers that share a scale."""
_BYTES = 34


def row_bytes(head_dim: int) -> int:
    """Size of `head_dim` numbers [bytes]: whole blocks."""
    assert head_dim % BLOCK == 0
    return head_dim // BLOCK * _BYTES


def codes_and_scales(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Floats [..., head_dim] as int8 codes [..., head_dim] and float16 scales [..., head_dim / 32]."""
    blocks = _split(rows.float(), BLOCK)
    # on a GPU torch multiplies by the reciprocal of a number that is on the host, which rounds otherwise
    scales = blocks.abs().amax(-1, keepdim=True) / torch.full((), 127.0, device=rows.device)
    scaled = blocks * torch.where(scales == 0, 0.0, 1 / scales)
    magnitude = scaled.abs().floor()
    magnitude += (2 * (scaled.abs() - magnitude)).floor()  # half away from zero
    # what is no number has a scale that is none; its codes mean nothing
    codes = torch.nan_to_num(magnitude, 0.0, 127.0).clamp(max=127).copysign(scaled).to(torch.int8)
    return codes.flatten(-2), scales[..., 0].half()


def values_of(codes: Tensor, scales: Tensor) -> Tensor:
    """The opposite: float32 [..., head_dim]."""
    return (scales.float()[..., None] * _split(codes, BLOCK).float()).flatten(-2)


def encoded(rows: Tensor) -> Tensor:
    """Floats [..., head_dim] as bytes, uint8 [..., row_bytes]."""
    codes, scales = codes_and_scales(rows)
    blocks = [part.view(torch.uint8) for part in (scales[..., None], _split(codes, BLOCK))]
    return torch.cat(blocks, -1).flatten(-2)


def decoded(stored: Tensor) -> Tensor:
    """The opposite: float32 [..., head_dim]."""
    blocks = _split(stored, _BYTES)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    return values_of(blocks[..., 2:].contiguous().view(torch.int8).flatten(-2), scales)


def _split(rows: Tensor, length: int) -> Tensor:
    """Rows [..., n * length] as [..., n, length]."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // length, length)
