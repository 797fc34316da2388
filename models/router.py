"""Norms and top-K routing in plain torch. Knows tensors; not the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fiddler.models.architecture import Norm, RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights

__all__ = ["LEAST_SUM", "centred", "rms_norm", "route"]

LEAST_SUM = 2.0**-14  # that scores are divided by, as in llama.cpp: sigmoids may all be 0


def route(h: Tensor, epsilon: float, weights: RouterWeights, rule: RouterRule, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """RMS norm of h [T, D], and the K chosen experts of each token with their routing weights, both [T, K].

    See `RouterRule` for the rule. Largest weight first, but for the selection bias.
    """
    x = rms_norm(h, weights.norm, epsilon)
    logits = F.linear(x, weights.gate, weights.bias)
    scores = torch.softmax(logits, -1) if rule.scoring is Scoring.SOFTMAX else torch.sigmoid(logits)
    ranks = scores if weights.selection_bias is None else scores + weights.selection_bias
    if rule.groups > 1:
        ranks = _of_best_groups(ranks, rule, two=weights.selection_bias is not None)
    expert_ids = torch.topk(ranks, k).indices
    routing_weights = scores.gather(-1, expert_ids)
    if rule.renormalise:
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True).clamp(min=LEAST_SUM)
    return x, expert_ids, routing_weights if rule.scale == 1.0 else routing_weights * rule.scale


def _of_best_groups(ranks: Tensor, rule: RouterRule, *, two: bool) -> Tensor:
    """`ranks` [T, E] with -inf for the experts of all but the best groups. two: by the sum of a group's two best."""
    grouped = ranks.view(len(ranks), rule.groups, -1)
    count = min(2, grouped.shape[-1]) if two else 1
    best = torch.topk(grouped.topk(count).values.sum(-1), rule.groups_used).indices  # [T, groups_used]
    stays = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, best, True)
    return grouped.masked_fill(~stays[..., None], -torch.inf).view_as(ranks)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm in plain torch: implements `Norm`."""
    return F.rms_norm(x, weight.shape, weight, epsilon)


def centred(h: Tensor, norm: Norm) -> Tensor:
    """The input of the RMS norm that computes `norm` of h [T, D]: a layer norm's is h less the mean of each row."""
    return h - h.mean(-1, keepdim=True) if norm is Norm.LAYER else h
