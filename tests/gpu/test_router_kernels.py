"""The Triton router against torch's and sorted lists, for every rule; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import itertools
import os
import sys
from math import exp, inf

import pytest
import torch

from fiddler.models.architecture import RouterRule, Scoring
from fiddler.models.interfaces import RouterWeights
from fiddler.models.router import LEAST_SUM, route
from oracles.gpu_time import replayed
from oracles.interpreter import run_in_interpreter

try:
    from fiddler.gpu import router_kernels
except ImportError:
    router_kernels = None

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
BOUND = 5e-6 if GPU else 1e-6  # a GPU's exponential and division are not rounded as the CPU's
kernels_run = pytest.mark.skipif(not (GPU or INTERPRETED), reason="Triton runs neither on a GPU nor in its interpreter")

SIZES = {  # experts, chosen, width, groups and how many of them are used
    "8 experts": (8, 2, 96, 1, 1),
    "all of 5, odd": (5, 5, 90, 1, 1),
    "1 expert": (1, 1, 16, 1, 1),
    "60 of Qwen2-MoE": (60, 4, 64, 1, 1),
    "2 groups": (8, 3, 64, 2, 1),
    "groups of 1": (6, 2, 32, 6, 3),
    "160 in 8 groups, as DeepSeek-V2": (160, 6, 64, 8, 3),
    "256 in 8 groups, as DeepSeek-V3": (256, 8, 300, 8, 4),
    "384, 16 chosen": (384, 16, 200, 1, 1),
    "3 of 5 groups": (20, 7, 33, 5, 3),
}
RULES = list(itertools.product(Scoring, (True, False), (False, True), (False, True)))


def rule_of(scoring, renormalise, groups, used):
    return RouterRule(scoring, renormalise, 2.5 if scoring is Scoring.SIGMOID else 1.0, groups, used)


def naive(logits, weights, rule, k):
    """Expert ids and routing weights of one token in Python's floats. Of equal ranks the first comes first."""
    if rule.scoring is Scoring.SIGMOID:
        scores = [1 / (1 + exp(-each)) for each in logits]
    else:
        powers = [exp(each - max(logits)) for each in logits]
        scores = [each / sum(powers) for each in powers]
    added = [0.0] * len(scores) if weights.selection_bias is None else weights.selection_bias.tolist()
    ranks = [score + more for score, more in zip(scores, added, strict=True)]
    size, count = len(ranks) // rule.groups, 1 if weights.selection_bias is None else 2
    of_group = [sum(sorted(ranks[g * size : (g + 1) * size])[-count:]) for g in range(rule.groups)]
    best = sorted(range(rule.groups), key=lambda g: (-of_group[g], g))[: rule.groups_used]
    ranks = [rank if e // size in best else -inf for e, rank in enumerate(ranks)]
    chosen = sorted(range(len(ranks)), key=lambda e: (-ranks[e], e))[:k]
    total = max(sum(scores[e] for e in chosen), LEAST_SUM) if rule.renormalise else 1.0
    return chosen, [scores[e] / total * rule.scale for e in chosen]


@pytest.mark.skipif(GPU or INTERPRETED or router_kernels is None, reason="the kernels run in this process")
def test_the_router_is_right_in_tritons_interpreter():
    run_in_interpreter(__file__)


def random_weights(experts, width, selection, bias, generator):
    gate = torch.randn(experts, width, generator=generator) * 2 / width**0.5
    selection_bias = torch.randn(experts, generator=generator) * 0.2 if selection else None
    return RouterWeights(
        torch.rand(width, generator=generator) + 0.5,
        gate,
        selection_bias,
        torch.randn(experts, generator=generator) if bias else None,
    )


def at_device(weights):
    return mapped(lambda each: each.to(DEVICE), weights)


def mapped(change, weights):
    return RouterWeights(*(None if each is None else change(each) for each in vars(weights).values()))


def settled(h, weights, rule, k, generator):
    """`h` with tokens drawn again until no rounding of their logits changes the choice."""
    while True:
        choices = []
        for _ in range(5):
            near = mapped(lambda each: each.double() + 1e-5 * torch.randn(each.shape, generator=generator), weights)
            choices.append(route(h.double(), 1e-5, near, rule, k)[1])
        changed = torch.stack([(each != choices[0]).any(-1) for each in choices]).any(0)
        if not changed.any():
            return h
        h[changed] = torch.randn(int(changed.sum()), h.shape[1], generator=generator)


@kernels_run
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("most,rules", [(0, RULES), (1 << 30, RULES[::3])], ids=["three kernels", "one"])
def test_kernels_choose_what_torch_chooses_with_its_weights_under_every_rule(size, most, rules, monkeypatch):
    """Both ways share what differs by rule."""
    monkeypatch.setattr(router_kernels, "_ELEMENTS_OF_ONE", most)
    experts, k, width, groups, used = size
    generator = torch.Generator().manual_seed(experts)
    for scoring, renormalise, selection, bias in rules:
        rule = rule_of(scoring, renormalise, groups, used)
        weights = random_weights(experts, width, selection, bias, generator)
        for tokens in (1, 3):
            h = settled(torch.randn(tokens, width, generator=generator) * 3, weights, rule, k, generator)
            x, expert_ids, routing_weights = router_kernels.route(h.to(DEVICE), 1e-5, at_device(weights), rule, k)
            expected = route(h, 1e-5, weights, rule, k)
            assert torch.equal(expert_ids.cpu(), expected[1]), (rule, selection, bias)
            torch.testing.assert_close(routing_weights.cpu(), expected[2], rtol=BOUND, atol=BOUND)
            torch.testing.assert_close(x.cpu(), expected[0], rtol=1e-6, atol=1e-5)


@kernels_run
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_kernels_choose_the_first_of_equal_experts_and_groups(size):
    """x is one number and zeros, so logits are that number times a column of few values, in any order of summation."""
    experts, k, width, groups, used = size
    generator = torch.Generator().manual_seed(experts)
    h = torch.zeros(1, width)
    h[0, 0] = 1.0
    for scoring, renormalise, selection, bias in RULES:
        values = 1 if selection == bias else 3
        rule = rule_of(scoring, renormalise, groups, used)
        weights = random_weights(experts, width, selection, bias, generator)
        column = torch.randint(0, values, (experts,), generator=generator) / width**0.5
        weights.gate[:, 0] = column
        if weights.bias is not None:
            weights.bias[:] = torch.randint(0, 2, (experts,), generator=generator) / 4
        if weights.selection_bias is not None:  # one of a group, else roundings of sums decide between groups
            each = torch.randint(0, 2, (groups if groups > 1 else experts,), generator=generator) / 4
            weights.selection_bias[:] = each.repeat_interleave(experts // len(each))
        x, expert_ids, routing_weights = router_kernels.route(h.to(DEVICE), 0.0, at_device(weights), rule, k)
        logits = column * x[0, 0].cpu() + (0.0 if weights.bias is None else weights.bias)
        ids, expected = naive(logits.tolist(), weights, rule, k)
        assert expert_ids.tolist() == [ids], (rule, selection, bias)
        torch.testing.assert_close(routing_weights.cpu(), torch.tensor([expected]), rtol=BOUND, atol=BOUND)


@kernels_run
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("where", ["h", "one logit", "selection bias", "infinite"])
def test_kernels_give_different_valid_experts_for_nan(size, where):
    experts, k, width, groups, used = size
    for scoring, renormalise, selection, bias in RULES[::3]:
        rule = rule_of(scoring, renormalise, groups, used)
        weights = random_weights(experts, width, selection or where == "selection bias", bias, torch.Generator())
        h = torch.ones(2, width)
        if where == "h":
            h[0] = torch.nan
        elif where == "one logit":
            weights.gate[experts // 2] = torch.nan
        elif where == "selection bias":
            weights.selection_bias[experts // 2] = torch.nan
        else:
            h[0, 0], weights.gate[0, 1] = torch.inf, -torch.inf
        _, expert_ids, routing_weights = router_kernels.route(h.to(DEVICE), 1e-5, at_device(weights), rule, k)
        for ids in expert_ids.tolist():
            assert len(set(ids)) == k
            assert all(0 <= each < experts for each in ids)
        if where == "h":
            assert routing_weights[0].isnan().all()
            assert routing_weights[1].isfinite().all()


@kernels_run
def test_kernels_divide_by_no_sum_of_zero():
    """Sigmoids that are all 0: torch divides by 2**-14, too."""
    weights = random_weights(8, 64, True, True, torch.Generator())
    weights.bias[:] = -200.0
    rule = RouterRule(Scoring.SIGMOID, True, 2.5)
    _, expert_ids, routing_weights = router_kernels.route(
        torch.ones(1, 64, device=DEVICE), 1e-5, at_device(weights), rule, 3
    )
    expected = route(torch.ones(1, 64), 1e-5, weights, rule, 3)
    assert torch.equal(expert_ids.cpu(), expected[1])
    assert routing_weights.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize("shape", [(8, 2, 4096, 1), (16, 4, 6144, 1), (64, 6, 2048, 1), (128, 8, 2048, 1),
                                   (160, 6, 5120, 8), (256, 8, 7168, 8)], ids=str)  # fmt: skip
def test_time_of_routing_is_printed(shape, monkeypatch):
    """For `pytest -rP`: of one token and of 512, in one kernel, in three, and in torch, within a graph."""
    experts, k, width, groups = shape
    sigmoid = experts == 256
    rule = rule_of(Scoring.SIGMOID if sigmoid else Scoring.SOFTMAX, True, groups, max(1, groups // 2))
    weights = at_device(random_weights(experts, width, sigmoid, False, torch.Generator()))
    for tokens in (1, 512):
        h, figures = torch.randn(tokens, width, device=DEVICE), []
        for name, most in (("one kernel", 1 << 30), ("three", 0), ("torch", None)):
            if most is not None:
                monkeypatch.setattr(router_kernels, "_ELEMENTS_OF_ONE", most)
            way = route if most is None else router_kernels.route
            seconds = replayed(lambda way=way, h=h: way(h, 1e-5, weights, rule, k))
            figures.append(f"{name} {seconds * 1e6:.1f} us")
        sys.stdout.write(f"{shape}, {tokens} tokens: {', '.join(figures)}\n")
