"""Triton kernels of the router, for every `RouterRule`: norm, logits, scores, groups, top K, routing weights.

Knows tensors and rules; not the model. `models/router.py` is the counterpart in plain torch, which the tests compare it
with. A small router is one kernel; a larger one, whose matrix one of the GPU's processors would take long to read, is
three: norm, product, choice; of one token two, the first of which normalises and multiplies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fiddler.gpu.decode_kernels import norm
from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights
from fiddler.models.router import LEAST_SUM

__all__ = ["route"]

_ELEMENTS_OF_ONE, _OF_ONE_TOKEN = 1 << 16, 1 << 14  # of a matrix, up to which one program computes a token's logits
_ONE_WARP = 256  # experts up to which one warp chooses: several would exchange each maximum through memory
_LOWEST = tl.constexpr(-(1 << 63))  # below every `_ranked`
_LEAST_SUM = tl.constexpr(LEAST_SUM)
_SIGN_LESS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _ranked(x, index):
    """int64 in the order of float32 x, equal ones by the lower index, NaN above all."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 as 0
    ordered = tl.where(x != x, _SIGN_LESS, bits ^ ((bits >> 31) & _SIGN_LESS))
    return (ordered.to(tl.int64) << 32) | (index ^ _SIGN_LESS).to(tl.int64)


@triton.jit
def _value(ranked):
    """The x of `_ranked`."""
    ordered = (ranked >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _SIGN_LESS)).to(tl.float32, bitcast=True)


@triton.jit
def _index(ranked):
    """The index of `_ranked`."""
    return (ranked & _SIGN_LESS) ^ _SIGN_LESS


@triton.jit
def _of_best_groups(ranks, e, experts, G: tl.constexpr, GROUPS: tl.constexpr, USED: tl.constexpr, TWO: tl.constexpr):
    """`ranks` [N] with -inf for the experts of all but the best groups: see `models.router`. TWO: by their two best."""
    size = experts // GROUPS
    g = tl.arange(0, G)
    own = tl.where((e // size)[None, :] == g[:, None], _ranked(ranks, e)[None, :], _LOWEST)
    first = tl.max(own, 1)
    best = _value(first)
    if TWO:
        best += _value(tl.max(tl.where(own == first[:, None], _LOWEST, own), 1))
    groups = tl.where(g < GROUPS, _ranked(best, g), _LOWEST)
    stays = e < 0
    for _ in tl.static_range(USED):
        top = tl.max(groups, 0)
        stays = stays | (e // size == _index(top))
        groups = tl.where(groups == top, _LOWEST, groups)
    return tl.where(stays, ranks, float("-inf"))


@triton.jit
def _choose(
    logits,
    e,
    bias,
    selection_bias,
    expert_ids,
    routing_weights,
    experts,
    scale,
    TOP: tl.constexpr,
    J: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SELECTION: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    USED: tl.constexpr,
    TWO: tl.constexpr,
):
    """Write one token's experts and routing weights, from its logits [N] of experts `e`."""
    if BIASED:
        logits += tl.load(bias + e, mask=e < experts, other=0.0)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        logits = tl.where(e < experts, logits, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    ranks = scores
    if SELECTION:
        ranks += tl.load(selection_bias + e, mask=e < experts, other=0.0)
    if GROUPS > 1:
        ranks = _of_best_groups(ranks, e, experts, G, GROUPS, USED, TWO)
    ranked = tl.where(e < experts, _ranked(ranks, e), _LOWEST)
    j = tl.arange(0, J)
    ids = tl.zeros([J], tl.int64)
    chosen = tl.zeros([J], tl.float32)
    for i in tl.static_range(TOP):  # every id is one of an expert, and comes once, also where scores are NaN
        top = tl.max(ranked, 0)
        ids = tl.where(j == i, _index(top), ids)
        chosen = tl.where(j == i, tl.sum(tl.where(e == _index(top), scores, 0.0), 0), chosen)
        ranked = tl.where(ranked == top, _LOWEST, ranked)
    if RENORMALISE:
        chosen = chosen / tl.maximum(tl.sum(chosen, 0), _LEAST_SUM)
    tl.store(expert_ids + j, ids, mask=j < TOP)
    tl.store(routing_weights + j, chosen * scale, mask=j < TOP)


@triton.jit
def _normed_logits(h, norm, w, x, logits, width, epsilon, K: tl.constexpr):
    """The product of one token's normalised h with a row of w; the first program writes that h, x, as well."""
    e = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K)
    inside = k < width
    row = tl.load(w + e * width + k, mask=inside, other=0.0)
    a = tl.load(h + k, mask=inside, other=0.0)
    a = a * tl.rsqrt(tl.sum(a * a, 0) / width + epsilon) * tl.load(norm + k, mask=inside, other=0.0)
    tl.store(logits + e, tl.sum(row * a, 0))
    if e == 0:
        tl.store(x + k, a, mask=inside)


@triton.jit
def _choose_each(
    logits,
    bias,
    selection_bias,
    expert_ids,
    routing_weights,
    experts,
    scale,
    N: tl.constexpr,
    TOP: tl.constexpr,
    J: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SELECTION: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    USED: tl.constexpr,
    TWO: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, N)
    own = tl.load(logits + t * experts + e, mask=e < experts, other=0.0)
    _choose(
        own, e, bias, selection_bias, expert_ids + t * TOP, routing_weights + t * TOP, experts, scale,
        TOP, J, SIGMOID, RENORMALISE, BIASED, SELECTION, G, GROUPS, USED, TWO,
    )  # fmt: skip


@triton.jit
def _route(
    h,
    norm,
    w,
    x,
    bias,
    selection_bias,
    expert_ids,
    routing_weights,
    experts,
    width,
    epsilon,
    scale,
    WIDE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    TOP: tl.constexpr,
    J: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    SELECTION: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    USED: tl.constexpr,
    TWO: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h += t * width
    x += t * width
    wide = tl.arange(0, WIDE)
    whole = tl.load(h + wide, mask=wide < width, other=0.0)
    shrink = tl.rsqrt(tl.sum(whole * whole, 0) / width + epsilon)
    tl.store(x + wide, whole * shrink * tl.load(norm + wide, mask=wide < width, other=0.0), mask=wide < width)
    e = tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros([N, K], tl.float32)
    for begin in range(0, width, K):
        inside = begin + k < width
        a = tl.load(h + begin + k, mask=inside, other=0.0) * shrink
        a = a * tl.load(norm + begin + k, mask=inside, other=0.0)
        mask = (e < experts)[:, None] & inside[None, :]
        total += tl.load(w + e[:, None] * width + (begin + k)[None, :], mask=mask, other=0.0) * a[None, :]
    _choose(
        tl.sum(total, 1), e, bias, selection_bias, expert_ids + t * TOP, routing_weights + t * TOP, experts, scale,
        TOP, J, SIGMOID, RENORMALISE, BIASED, SELECTION, G, GROUPS, USED, TWO,
    )  # fmt: skip


def route(h: Tensor, epsilon: float, weights: RouterWeights, rule: RouterRule, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Implements `Router`: expert_ids are int64, in the order of the choice.

    Of equal ranks the lower expert comes first. Where scores are NaN the K ids are still different experts.
    """
    gate, h = weights.gate, h.contiguous()
    tokens, (experts, width) = len(h), gate.shape
    expert_ids = torch.empty(tokens, k, dtype=torch.int64, device=h.device)
    routing_weights = torch.empty(tokens, k, device=h.device)
    biases = [gate if each is None else each for each in (weights.bias, weights.selection_bias)]
    groups = 1 if rule.groups_used == rule.groups else rule.groups
    two = weights.selection_bias is not None and rule.groups < experts
    constants = (
        max(2, triton.next_power_of_2(experts)), k, triton.next_power_of_2(k),
        rule.scoring is Scoring.SIGMOID, rule.renormalise, weights.bias is not None, weights.selection_bias is not None,
        triton.next_power_of_2(groups), groups, rule.groups_used, two,
    )  # fmt: skip
    outputs = expert_ids, routing_weights, experts
    if gate.numel() > (_ELEMENTS_OF_ONE if tokens > 1 else _OF_ONE_TOKEN):
        if tokens == 1:
            x, logits = torch.empty_like(h), torch.empty(1, experts, device=h.device)
            _normed_logits[(experts,)](
                h, weights.norm, gate, x, logits, width, epsilon, triton.next_power_of_2(width), num_warps=8
            )
        else:
            x = norm(h, weights.norm, epsilon)
            logits = F.linear(x, gate)
        warps = 1 if experts <= _ONE_WARP else 4
        _choose_each[(tokens,)](logits, *biases, *outputs, rule.scale, *constants, num_warps=warps)
        return x, expert_ids, routing_weights
    x, wide = torch.empty_like(h), triton.next_power_of_2(width)
    block = max(16, min(wide, 16384 // constants[0]))
    _route[(tokens,)](
        h, weights.norm, gate, x, *biases, *outputs, width, epsilon, rule.scale, wide, block, *constants, num_warps=16
    )
    return x, expert_ids, routing_weights
