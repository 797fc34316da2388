"""Activations of feed-forwards in plain torch. Knows tensors; not the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.architecture import Activation

__all__ = ["activated"]

_SHARPNESS, _LIMIT = 1.702, 7.0  # of the clamped activation


def activated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Hidden activations of the products with gate and up, all of one shape: see `Activation`."""
    if activation is Activation.SILU:
        return F.silu(gate) * up
    gate = gate.clamp(max=_LIMIT)
    return gate * torch.sigmoid(_SHARPNESS * gate) * (up.clamp(-_LIMIT, _LIMIT) + 1)
