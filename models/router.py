"""RMS norm and top-K routing in plain torch. Knows tensors; not the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["rms_norm", "route"]


def route(h: Tensor, norm: Tensor, epsilon: float, weight: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of h [T, D], expert_ids of the K most probable experts, routing_weights that sum to 1, both [T, K]."""
    x = rms_norm(h, norm, epsilon)
    routing_weights, expert_ids = torch.topk(torch.softmax(F.linear(x, weight), -1), k)
    return x, expert_ids, routing_weights / routing_weights.sum(-1, keepdim=True)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm in plain torch: implements `Norm`."""
    return F.rms_norm(x, weight.shape, weight, epsilon)
