"""Plans against brute force over every possible split, and against results computed by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf
from statistics import mean

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.cost_curve import Curve
from fiddler.offload.plan import Balance, Costs, make_plan
from oracles.plans import brute_force, cost, greedy

HIDDEN = 6
MISSING = 7


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
    assert plan.seconds == pytest.approx(cost(tokens, plan.gpu_rows, costs, ahead, HIDDEN))
    assert plan.seconds == pytest.approx(brute_force(tokens, costs, step, ahead, HIDDEN))
    assert all(a <= rows <= HIDDEN for rows, a in zip(plan.gpu_rows, ahead, strict=True))


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(1, 64), min_size=1, max_size=4), cpu=positive, gpu=positive, copy=positive)
def test_plan_is_within_a_row_of_the_optimum_and_no_worse_than_one_side_alone(tokens, cpu, gpu, copy):
    costs = Costs(Curve((1, 64), (cpu, 9 * cpu)), Curve((1, 64), (0.1 * gpu, 6 * gpu)), copy, 0.0)
    none = [0] * len(tokens)
    plan = make_plan(tokens, costs, HIDDEN, 1)
    alone = min(cost(tokens, none, costs, none, HIDDEN), cost(tokens, [HIDDEN] * len(tokens), costs, none, HIDDEN))
    assert plan.seconds <= alone * (1 + 1e-12)
    one_row = max(max(costs.cpu(t), costs.gpu(t), copy) for t in tokens) / HIDDEN
    assert plan.seconds <= brute_force(tokens, costs, 1, none, HIDDEN) + one_row * (1 + 1e-12)


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 64), min_size=0, max_size=4),
    cpu=st.tuples(positive, positive),
    copy=positive,
    alone=st.tuples(positive, positive),
    starts=st.tuples(st.floats(0, 1), st.floats(-1, 1)),
    splits=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    step=st.sampled_from([1, 2, 3]),
)
def test_a_plan_is_optimal_where_a_split_costs_seconds_and_each_side_alone_is_faster(
    tokens, cpu, copy, alone, starts, splits, step
):
    alone = {"copy_alone": alone[0], "cpu_alone": Curve((1, 64), (alone[1], 9 * alone[1]))}
    costs = Costs(Curve((1, 64), (cpu[0], cpu[0] + cpu[1])), Curve((1,), (0.0,)), copy, 0.0, *starts, **alone)
    costs = replace(costs, cpu_split=splits[0], copy_split=splits[1])
    none = [0] * len(tokens)
    plan = make_plan(tokens, costs, HIDDEN, step)
    assert plan.seconds == pytest.approx(cost(tokens, plan.gpu_rows, costs, none, HIDDEN))
    assert plan.seconds == pytest.approx(brute_force(tokens, costs, step, none, HIDDEN))
    assert sum(0 < rows < HIDDEN for rows in plan.gpu_rows) <= 1


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 600), min_size=1, max_size=24),
    cpu=st.tuples(positive, positive),
    gpu=st.tuples(positive, positive),
    copy=positive,
    memory=st.floats(0, 3),
    starts=st.tuples(st.floats(0, 1), st.floats(-1, 1)),
    splits=st.sampled_from([(0.0, 0.0), (0.3, 0.1), (5.0, 5.0)]),
    data=st.data(),
)
def test_a_plan_of_many_experts_costs_no_more_than_a_search_that_tries_each_step(
    tokens, cpu, gpu, copy, memory, starts, splits, data
):
    """Also where some experts were prefetched, and where the GPU's products take longer than the copies."""
    curves = Curve((1, 512), (cpu[0], cpu[0] + 20 * cpu[1])), Curve((1, 512), (0.1 * gpu[0], gpu[0] + gpu[1]))
    costs = Costs(*curves, copy, memory, *starts, 0.9 * copy, cpu_split=splits[0], copy_split=splits[1])
    hidden, step = 768, 64
    ahead = [data.draw(st.sampled_from([0, 0, 0, 256, hidden])) for _ in tokens]
    plan = make_plan(tokens, costs, hidden, step, ahead)
    assert plan.seconds == pytest.approx(cost(tokens, plan.gpu_rows, costs, ahead, hidden))
    assert plan.seconds <= greedy(tokens, costs, step, ahead, hidden) * (1 + 1e-9)


def test_small_experts_are_shared_out_whole_where_a_split_costs_more_than_it_saves():
    """Eight experts, 75 us on the CPU, 180 over the link: two of them and a twelfth more, or two sets of whole ones."""
    costs = Costs(Curve((1,), (75e-6,)), Curve((1,), (10e-6,)), 180e-6, 53e-6)
    assert make_plan([1] * 8, costs, 768, 64).gpu_rows == (768, 768, 256, 0, 0, 0, 0, 0)
    plan = make_plan([1] * 8, replace(costs, cpu_split=30e-6, copy_split=60e-6), 768, 64)
    assert plan.gpu_rows == (768, 768, 0, 0, 0, 0, 0, 0)
    assert plan.lead == pytest.approx(6 * 75e-6 - 2 * 180e-6)


@pytest.mark.parametrize("margin,rows", [(0.0, 96), (0.02, 96), (0.05, 128)])
def test_the_cpu_gets_no_rows_where_they_save_less_than_the_margin(margin, rows):
    """The CPU takes 31 times as long as the copy: computing a quarter of one of eight experts saves 3 %."""
    costs = Costs(Curve((1,), (31.0,)), Curve((1,), (0.0,)), 1.0, 0.0)
    plan = make_plan([5] * 8, costs, 128, 32, margin=margin)
    assert plan.gpu_rows == (128,) * 7 + (rows,)
    assert plan.seconds == pytest.approx(8.0 if rows == 128 else 7.75)


@pytest.mark.parametrize("margin,rows", [(0.0, 32), (0.05, 0)])
def test_the_gpu_gets_no_rows_where_they_save_less_than_the_margin(margin, rows):
    """The copy takes 20 times as long as the CPU: streaming a fifth of one of eight experts saves 2.5 %."""
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), 20.0, 0.0, cpu_alone=Curve((1,), (1.0,)))
    assert make_plan([5] * 8, costs, 160, 32, margin=margin).gpu_rows == (rows,) + (0,) * 7


def test_everything_is_left_to_the_cpu_where_copies_slow_it_by_more_than_they_save():
    costs = Costs(Curve((1,), (1.0,)), Curve((1,), (0.0,)), 5.0, 0.0, cpu_alone=Curve((1,), (0.8,)))
    plan = make_plan([5] * 8, costs, 128, 32)
    assert plan.gpu_rows == (0,) * 8
    assert plan.seconds == pytest.approx(8 * 0.8)


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
            plan = make_plan([1, 1], replace(costs, copy_start=balance.delays(8)[MISSING]), hidden, 64)
            gpu_part = sum(plan.gpu_rows) / hidden
            cpu, gpu = (2 - gpu_part) * costs.cpu(1), gpu_part * costs.copy + late
            balance.tell(MISSING, gpu_first=gpu < cpu)
        assert abs(balance.delays(8)[MISSING] - late) < 60e-6
        assert abs(cpu - gpu) < 100e-6


def test_a_balance_far_off_is_found_in_few_tokens_and_the_gpu_is_then_late_less_often_than_the_cpu():
    """The calibration took the CPU for a third as fast as it is; the GPU's time varies."""
    calibrated, noise = Costs(Curve((1,), (0.45e-3,)), Curve((1,), (0.0,)), 0.18e-3, 0.0), random.Random(0)
    balance, late = Balance(), []
    for _ in range(400):
        plan = make_plan([1] * 7, replace(calibrated, copy_start=balance.delays(8)[MISSING]), 768, 64)
        gpu_part = sum(plan.gpu_rows) / 768
        late.append(gpu_part * 0.18e-3 + noise.gauss(0, 30e-6) > (7 - gpu_part) * 0.15e-3)
        balance.tell(MISSING, gpu_first=not late[-1])
    assert not all(late[:30])
    assert 0.25 < mean(late[-300:]) < 0.5


def test_the_balance_of_a_layer_is_that_of_each_number_of_missing_experts():
    """The copies take 60 % longer than planned, so the GPU is the later the more experts are missing."""
    costs, balance = Costs(Curve((1,), (75e-6,)), Curve((1,), (0.0,)), 180e-6, 0.0), Balance()
    differences, delays = ({missing: [] for missing in (4, 6, 8)} for _ in range(2))
    for token in range(300):
        missing = (4, 6, 8)[token % 3]
        plan = make_plan([1] * missing, replace(costs, copy_start=balance.delays(8)[missing]), 768, 64)
        gpu_part = sum(plan.gpu_rows) / 768
        cpu, gpu = (missing - gpu_part) * costs.cpu(1), gpu_part * costs.copy * 1.6
        differences[missing].append(gpu - cpu)
        delays[missing].append(balance.delays(8)[missing])
        balance.tell(missing, gpu_first=gpu < cpu, lead=plan.lead)
    assert all(abs(mean(each[-40:])) < 25e-6 for each in differences.values())
    assert mean(delays[8][-40:]) > mean(delays[4][-40:]) + 50e-6


def test_other_numbers_of_missing_experts_follow_half_way():
    balance = Balance()
    assert balance.delays(3) == (0.0,) * 4
    for _ in range(4):
        balance.tell(2, gpu_first=False)
    assert balance.delays(3) == pytest.approx((50e-6, 50e-6, 100e-6, 50e-6))
    same = balance.delays(3)
    assert balance.delays(3) is same
    for _ in range(4):
        balance.tell(3, gpu_first=False)
    assert balance.delays(3) == pytest.approx((100e-6, 100e-6, 150e-6, 150e-6))


def test_balance_rests_where_a_plan_of_whole_experts_leaves_the_gpu_waiting():
    """Six experts on the CPU and two on the GPU: moving a third would make the GPU the later side by far."""
    balance, costs = Balance(), Costs(Curve((1,), (75e-6,)), Curve((1,), (0.0,)), 180e-6, 0.0, cpu_split=1.0)
    for _ in range(50):
        plan = make_plan([1] * 8, replace(costs, copy_start=balance.delays(8)[MISSING]), 768, 64)
        assert plan.gpu_rows == (768,) * 2 + (0,) * 6
        balance.tell(MISSING, gpu_first=True, lead=plan.lead)
    assert balance.delays(8)[MISSING] == 0
    balance.tell(MISSING, gpu_first=False, lead=plan.lead)
    assert balance.delays(8)[MISSING] > 0


def test_balance_tries_the_gpu_again_after_a_time_in_which_copies_came_late():
    """Some experts take less than the largest delay: without a part, the GPU would never be measured again."""
    balance, costs = Balance(), Costs(Curve((1,), (75e-6,)), Curve((1,), (0.0,)), 180e-6, 0.0)
    for _ in range(40):
        balance.tell(MISSING, gpu_first=False)
    streamed = []
    for _ in range(1000):
        plan = make_plan([1] * 8, replace(costs, copy_start=balance.delays(8)[MISSING]), 768, 64)
        streamed.append(any(plan.gpu_rows))
        if any(plan.gpu_rows):
            balance.tell(MISSING, gpu_first=plan.lead > 0 or balance.delays(8)[MISSING] > 0, lead=plan.lead)
        else:
            balance.tell_alone(MISSING)
    assert not any(streamed[:100])
    assert all(streamed[-100:])


def test_costs_of_other_formats_follow_from_their_bytes():
    """Half the bytes of an expert are copied and read in half the time; what computing takes is not known from them."""
    costs = Costs(Curve((1,), (4.0,)), Curve((1,), (1.0,)), 2.0, 0.5, copy_alone=1.5)
    assert costs.scaled(1.0) is costs
    half = costs.scaled(0.5)
    assert (half.copy, half.copy_alone, half.memory) == (1.0, 0.75, 0.25)
    assert (half.cpu, half.gpu) == (costs.cpu, costs.gpu)
    assert Costs(costs.cpu, costs.gpu, inf, 0.0).scaled(0.5).copy == inf
