"""Plans against brute force over every possible split, and against what cannot be undercut."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.offload.plan import Balance, Costs, Curve, make_plan

HIDDEN = 6


def cost(tokens, rows, costs, ahead):
    """The objective as the module states it, written out once more."""
    cpu = sum(costs.cpu(t) * (HIDDEN - r) / HIDDEN for t, r in zip(tokens, rows, strict=True))
    moved = any(r > a for r, a in zip(rows, ahead, strict=True))
    left = any(r < HIDDEN for r in rows)
    copy = costs.copy if left else min(costs.copy, costs.copy_alone)
    gpu = sum(max(copy, costs.gpu(t)) * (r - a) / HIDDEN for t, r, a in zip(tokens, rows, ahead, strict=True) if r > a)
    return max(cpu + costs.cpu_start if left else 0, gpu + costs.copy_start if moved else 0, costs.memory * len(tokens))


def brute_force(tokens, costs, step, ahead):
    choices = [sorted({*range(a, HIDDEN + 1, step), HIDDEN}) for a in ahead]
    return min(cost(tokens, rows, costs, ahead) for rows in product(*choices))


positive = st.floats(0.01, 10)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 64), min_size=0, max_size=4),
    cpu=st.tuples(positive, positive),
    copy=positive,
    alone=st.one_of(positive, st.just(inf)),
    memory=st.floats(0, 3),
    starts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    step=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_plan_is_the_best_of_all_where_the_link_is_what_the_gpu_waits_for(
    tokens, cpu, copy, alone, memory, starts, step, data
):
    costs = Costs(Curve((1, 64), (cpu[0], cpu[0] + cpu[1])), Curve((1,), (0.0,)), copy, memory, *starts, alone)
    ahead = [step * data.draw(st.integers(0, HIDDEN // step)) for _ in tokens]
    plan = make_plan(tokens, costs, HIDDEN, step, ahead)
    assert plan.seconds == pytest.approx(cost(tokens, plan.gpu_rows, costs, ahead))
    assert plan.seconds == pytest.approx(brute_force(tokens, costs, step, ahead))
    assert all(a <= rows <= HIDDEN for rows, a in zip(plan.gpu_rows, ahead, strict=True))


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(1, 64), min_size=1, max_size=4), cpu=positive, gpu=positive, copy=positive)
def test_plan_is_near_the_best_and_no_worse_than_one_side_alone_in_general(tokens, cpu, gpu, copy):
    costs = Costs(Curve((1, 64), (cpu, 9 * cpu)), Curve((1, 64), (0.1 * gpu, 6 * gpu)), copy, 0.0)
    none = [0] * len(tokens)
    plan = make_plan(tokens, costs, HIDDEN, 1)
    alone = min(cost(tokens, none, costs, none), cost(tokens, [HIDDEN] * len(tokens), costs, none))
    assert plan.seconds <= alone * (1 + 1e-12)
    one_row = max(max(costs.cpu(t), costs.gpu(t), copy) for t in tokens) / HIDDEN
    assert plan.seconds <= brute_force(tokens, costs, 1, none) + one_row * (1 + 1e-12)


@pytest.mark.parametrize("margin,rows", [(0.0, 96), (0.02, 96), (0.05, 128)])
def test_what_saves_little_is_not_worth_the_cpus_part(margin, rows):
    """The CPU is 31 times as slow as the link: its quarter of the rows at most, for all of one expert's, saves 3 %."""
    costs = Costs(Curve((1,), (31.0,)), Curve((1,), (0.0,)), 1.0, 0.0)
    plan = make_plan([5] * 8, costs, 128, 32, margin=margin)
    assert plan.gpu_rows == (128,) * 7 + (rows,)
    assert plan.seconds == pytest.approx(8.0 if rows == 128 else 7.75)


def test_a_link_that_is_faster_alone_may_be_left_alone():
    """The CPU's quarter of an expert would save 3 % of a link that it slows by a tenth."""
    costs = Costs(Curve((1,), (31.0,)), Curve((1,), (0.0,)), 1.0, 0.0)
    assert make_plan([5] * 8, costs, 128, 32).gpu_rows == (128,) * 7 + (96,)
    plan = make_plan([5] * 8, replace(costs, copy_alone=0.9), 128, 32)
    assert plan.gpu_rows == (128,) * 8
    assert plan.seconds == pytest.approx(8 * 0.9)


def test_without_a_link_everything_is_the_cpus():
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.1,)), inf, 0.0)
    assert make_plan([3, 1], costs, 512, 64).gpu_rows == (0, 0)


def test_one_token_is_split_as_the_links_are_fast():
    """100 GB/s and 50 GB/s: the GPU takes a third of each expert's rows, whichever experts they are."""
    costs = Costs(Curve((1,), (1 / 100,)), Curve((1,), (0.0,)), 1 / 50, 1 / 150)
    assert sum(make_plan([1, 1], costs, 14336, 64).gpu_rows) / (2 * 14336) == pytest.approx(1 / 3, abs=0.005)


def test_experts_with_many_tokens_are_streamed_and_those_with_few_computed_where_they_are():
    costs = Costs(Curve((1, 100), (1.0, 50.0)), Curve((1,), (0.1,)), 3.0, 0.0)
    assert make_plan([2, 100, 1, 90], costs, 128, 64).gpu_rows == (0, 128, 0, 128)


def test_what_is_ahead_stays_there():
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), 100.0, 0.0)
    assert make_plan([1, 1], costs, 128, 64, [64, 0]).gpu_rows == (64, 0)


def test_curves_are_straight_between_points_and_beyond_the_last():
    curve = Curve((1, 3, 5), (1.0, 2.0, 6.0))
    assert [curve(t) for t in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 4.0, 6.0, 10.0]
    assert Curve((1,), (2.0,))(9) == 2.0


def test_balance_finds_what_the_gpu_begins_later():
    """Sides whose speeds the plan knows, of which one begins late by what it does not know: both end together."""
    costs, hidden = Costs(Curve((1,), (3e-3,)), Curve((1,), (0.0,)), 6e-3, 0.0), 14336
    for late in (0.0, 300e-6, -200e-6):
        balance = Balance()
        for _ in range(60):
            plan = make_plan([1, 1], replace(costs, copy_start=balance.seconds), hidden, 64)
            share = sum(plan.gpu_rows) / hidden
            cpu, gpu = (2 - share) * costs.cpu(1), share * costs.copy + late
            balance.tell(gpu_first=gpu < cpu)
        assert abs(balance.seconds - late) < 60e-6
        assert abs(cpu - gpu) < 100e-6
