"""Plans against brute force over every possible split, and against results computed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.offload.plan import Balance, Costs, Curve, make_plan

HIDDEN = 6


def cost(tokens, rows, costs, ahead):
    """The cost of a plan as its module defines it, written out independently."""
    cpu = sum(costs.cpu(t) * (HIDDEN - r) / HIDDEN for t, r in zip(tokens, rows, strict=True))
    copied = any(r > a for r, a in zip(rows, ahead, strict=True))
    on_cpu = any(r < HIDDEN for r in rows)
    copy = costs.copy if on_cpu else min(costs.copy, costs.copy_alone)
    gpu = sum(max(copy, costs.gpu(t)) * (r - a) / HIDDEN for t, r, a in zip(tokens, rows, ahead, strict=True) if r > a)
    return max(
        cpu + costs.cpu_start if on_cpu else 0, gpu + costs.copy_start if copied else 0, costs.memory * len(tokens)
    )


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
def test_plan_is_optimal_where_the_copy_limits_the_gpu(tokens, cpu, copy, alone, memory, starts, step, data):
    costs = Costs(Curve((1, 64), (cpu[0], cpu[0] + cpu[1])), Curve((1,), (0.0,)), copy, memory, *starts, alone)
    ahead = [step * data.draw(st.integers(0, HIDDEN // step)) for _ in tokens]
    plan = make_plan(tokens, costs, HIDDEN, step, ahead)
    assert plan.seconds == pytest.approx(cost(tokens, plan.gpu_rows, costs, ahead))
    assert plan.seconds == pytest.approx(brute_force(tokens, costs, step, ahead))
    assert all(a <= rows <= HIDDEN for rows, a in zip(plan.gpu_rows, ahead, strict=True))


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(1, 64), min_size=1, max_size=4), cpu=positive, gpu=positive, copy=positive)
def test_plan_is_within_a_row_of_the_optimum_and_no_worse_than_one_side_alone(tokens, cpu, gpu, copy):
    costs = Costs(Curve((1, 64), (cpu, 9 * cpu)), Curve((1, 64), (0.1 * gpu, 6 * gpu)), copy, 0.0)
    none = [0] * len(tokens)
    plan = make_plan(tokens, costs, HIDDEN, 1)
    alone = min(cost(tokens, none, costs, none), cost(tokens, [HIDDEN] * len(tokens), costs, none))
    assert plan.seconds <= alone * (1 + 1e-12)
    one_row = max(max(costs.cpu(t), costs.gpu(t), copy) for t in tokens) / HIDDEN
    assert plan.seconds <= brute_force(tokens, costs, 1, none) + one_row * (1 + 1e-12)


@pytest.mark.parametrize("margin,rows", [(0.0, 96), (0.02, 96), (0.05, 128)])
def test_the_cpu_gets_no_rows_where_they_save_less_than_the_margin(margin, rows):
    """The CPU takes 31 times as long as the copy: computing a quarter of one of eight experts saves 3 %."""
    costs = Costs(Curve((1,), (31.0,)), Curve((1,), (0.0,)), 1.0, 0.0)
    plan = make_plan([5] * 8, costs, 128, 32, margin=margin)
    assert plan.gpu_rows == (128,) * 7 + (rows,)
    assert plan.seconds == pytest.approx(8.0 if rows == 128 else 7.75)


def test_the_cpu_gets_no_rows_where_it_slows_the_copy_by_more_than_it_saves():
    """A quarter of an expert on the CPU would save 3 %, and slow the copy by a tenth."""
    costs = Costs(Curve((1,), (31.0,)), Curve((1,), (0.0,)), 1.0, 0.0)
    assert make_plan([5] * 8, costs, 128, 32).gpu_rows == (128,) * 7 + (96,)
    plan = make_plan([5] * 8, replace(costs, copy_alone=0.9), 128, 32)
    assert plan.gpu_rows == (128,) * 8
    assert plan.seconds == pytest.approx(8 * 0.9)


def test_where_nothing_can_be_copied_the_cpu_computes_everything():
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.1,)), inf, 0.0)
    assert make_plan([3, 1], costs, 512, 64).gpu_rows == (0, 0)


def test_experts_of_one_token_are_split_in_proportion_to_bandwidth():
    """The CPU reads 100 GB/s, the copy 50 GB/s: the GPU gets a third of the rows."""
    costs = Costs(Curve((1,), (1 / 100,)), Curve((1,), (0.0,)), 1 / 50, 1 / 150)
    assert sum(make_plan([1, 1], costs, 14336, 64).gpu_rows) / (2 * 14336) == pytest.approx(1 / 3, abs=0.005)


def test_experts_with_many_tokens_are_streamed_and_those_with_few_computed_on_the_cpu():
    costs = Costs(Curve((1, 100), (1.0, 50.0)), Curve((1,), (0.1,)), 3.0, 0.0)
    assert make_plan([2, 100, 1, 90], costs, 128, 64).gpu_rows == (0, 128, 0, 128)


def test_rows_already_on_the_gpu_stay_there():
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), 100.0, 0.0)
    assert make_plan([1, 1], costs, 128, 64, [64, 0]).gpu_rows == (64, 0)


def test_cost_curves_are_linear_between_points_and_beyond_the_last():
    curve = Curve((1, 3, 5), (1.0, 2.0, 6.0))
    assert [curve(t) for t in (1, 2, 3, 4, 5, 7)] == [1.0, 1.5, 2.0, 4.0, 6.0, 10.0]
    assert Curve((1,), (2.0,))(9) == 2.0


def test_balance_finds_how_late_the_gpu_begins():
    """The plan knows both speeds, but not that the GPU begins late: with the balance both sides end together."""
    costs, hidden = Costs(Curve((1,), (3e-3,)), Curve((1,), (0.0,)), 6e-3, 0.0), 14336
    for late in (0.0, 300e-6, -200e-6):
        balance = Balance()
        for _ in range(60):
            plan = make_plan([1, 1], replace(costs, copy_start=balance.seconds), hidden, 64)
            gpu_part = sum(plan.gpu_rows) / hidden
            cpu, gpu = (2 - gpu_part) * costs.cpu(1), gpu_part * costs.copy + late
            balance.tell(gpu_first=gpu < cpu)
        assert abs(balance.seconds - late) < 60e-6
        assert abs(cpu - gpu) < 100e-6
