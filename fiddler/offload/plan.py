"""Plans which of CPU and GPU computes a layer's missing experts, or both a part. Pure: knows numbers, not machines.

An expert that is not on the GPU can be computed by the CPU where its weights lie, streamed to the GPU and computed
there, or split: the GPU takes some of its F hidden rows (of gate and up, and columns of down), the CPU the others,
and their sums add. Both sides work at the same time and share the memory bandwidth, so a plan's cost is

    max(cpu start + sum of (1 - s_e) cpu(t_e) + cpu split * split experts,           where the CPU has any part
        copy start + sum of s_e max(copy, gpu(t_e)) + copy split * split experts,    where the GPU has any part
        experts * memory)

for s_e, the GPU's fraction of expert e, which has t_e tokens; all in seconds. A side that works alone has the memory to
itself and costs less, as measured alone. Experts go to the GPU whole, and at most one is split: where experts are
small, what a part costs beside its rows is more than a split saves, and the plan is two sets of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf

from fiddler.cost_curve import Curve

__all__ = ["Balance", "Costs", "Plan", "PlanFor", "make_plan", "plan_with_sums"]

_MARGIN = 0.05  # fraction of the time: a smaller saving is lost to the plan's errors


@dataclass(frozen=True)
class Costs:
    """Costs of one whole expert on this machine [s], as `fiddler calibrate` measures them."""

    cpu: Curve  # the CPU computes it
    gpu: Curve  # the GPU computes it
    copy: float  # its weights are copied to the GPU while the CPU computes; `inf` without a GPU
    memory: float  # its weights are read from memory, by both sides together
    cpu_start: float = 0.0  # before the CPU begins, and for the transfer of its result
    copy_start: float = 0.0  # before the first weights move
    copy_alone: float = inf  # `copy` while the CPU does not compute, where that is less
    cpu_alone: Curve | None = None  # `cpu` while nothing is copied, where that is less
    cpu_split: float = 0.0  # more, where the CPU computes a part of an expert
    copy_split: float = 0.0  # more, where a part of an expert is copied

    def scaled(self, factor: float) -> Costs:
        """The costs of an expert of so many times the bytes, as far as bytes decide: of its copy, and of the memory."""
        if factor == 1.0:
            return self
        copy, alone, memory = self.copy * factor, self.copy_alone * factor, self.memory * factor
        return replace(self, copy=copy, copy_alone=alone, memory=memory)


@dataclass(frozen=True)
class Plan:
    """The number of each expert's hidden rows, its last ones, that the GPU computes; and the expected time [s]."""

    gpu_rows: tuple[int, ...]
    seconds: float
    lead: float = 0.0  # by which the GPU is expected to end before the CPU [s], where both have a part


PlanFor = Callable[[tuple[int, ...], tuple[int, ...], float, int], Plan]
"""Plans missing experts: tokens of each, prefetched rows of each, the GPU's delay [s], tokens of the layer."""


class Balance:
    """Delays of the GPU's part after the CPU's [s] in one layer, adjusted at run time by which side finishes first.

    Calibration cannot know them: queueing copies beside a busy CPU takes time, and the speed of each side varies. Each
    layer has its own: nothing is queued before the first one of a token, and layers have different residents. And each
    number of missing experts has: where copies are slower than was measured, the GPU is the later the more is copied.

    A delay moves by one small step at a time, and those of other numbers by half of one: they follow changes, and one
    odd moment moves them little; if the same side was first many times, by several. A late GPU leaves the faster side
    waiting, so a delay rests where the GPU is late three times in eight. Plans of whole experts may leave one side
    waiting: then it moves only where the other side ends first than was expected.
    """

    _STEP, _MAX_STEPS = 25e-6, 80.0
    _LATE, _FIRST = 1.0, -0.6  # steps
    _ALIKE, _FASTER = 8, 3.0  # from so many results in a row that are alike on, steps are so much longer
    _EVEN = 50e-6  # an expected lead [s] up to which either side may end first
    _IDLE_TOKENS = 8  # of one side alone, after which the other may be tried again, one step nearer

    def __init__(self) -> None:
        self._of_all = 0.0  # steps
        self._more: dict[int, float] = {}  # steps for a number of missing experts
        self._idle_tokens: dict[int, int] = {}
        self._alike = 0  # negative where the GPU was first
        self._delays: tuple[float, ...] = ()

    def delays(self, most: int) -> tuple[float, ...]:
        """The values for `Costs.copy_start` for each number of missing experts up to `most`.

        Negative where the GPU is the faster side. The same tuple until one changes.
        """
        if len(self._delays) <= most:
            of_all, more = self._of_all, self._more
            self._delays = tuple([round(of_all + more.get(i, 0.0)) * self._STEP for i in range(most + 1)])
        return self._delays

    def tell(self, missing: int, *, gpu_first: bool, lead: float = 0.0) -> None:
        """Adjust after a layer with so many missing experts, in which both sides had a part. lead: see `Plan`."""
        self._idle_tokens[missing] = 0
        if abs(lead) > self._EVEN and gpu_first == (lead > 0):
            return
        self._alike = min(self._alike, 0) - 1 if gpu_first else max(self._alike, 0) + 1
        steps = self._FIRST if gpu_first else self._LATE
        self._move(missing, steps * self._FASTER if abs(self._alike) > self._ALIKE else steps)

    def tell_alone(self, missing: int) -> None:
        """Adjust after a layer in which one side had no part: a delay that nobody measures any more is forgotten."""
        idle = self._idle_tokens[missing] = self._idle_tokens.get(missing, 0) + 1
        steps = self._of_all + self._more.get(missing, 0.0)
        if idle >= self._IDLE_TOKENS and steps:
            self._idle_tokens[missing] = 0
            self._move(missing, -max(-1.0, min(1.0, steps)))

    def _move(self, missing: int, steps: float) -> None:
        most = self._MAX_STEPS / 2
        self._of_all = max(-most, min(most, self._of_all + steps / 2))
        self._more[missing] = max(-most, min(most, self._more.get(missing, 0.0) + steps / 2))
        self._delays = ()


def make_plan(
    tokens: Sequence[int],
    costs: Costs,
    hidden: int,
    step: int,
    prefetched: Sequence[int] | None = None,
    margin: float = 0.0,
) -> Plan:
    """The cheapest plan for missing experts with these numbers of tokens, each at least 1.

    hidden: F, the rows of an expert; the GPU's are a multiple of `step`, or all.
    prefetched: rows of each expert that are already on the GPU or on their way; they stay there and cost nothing.
    margin: a side is left out where it saves no more than this fraction of the time: the other one alone has the memory
    to itself, and needs no sums of the other.
    Exact where streaming costs the same for every expert, that is, where the GPU waits for the copies. Else experts
    go to the GPU in the order of their savings, a good one (Dantzig's for the continuous knapsack), and the rounding to
    whole experts or whole steps may miss the best. Takes E log E: some 10 us for a token, 100 us for a prompt.
    """
    on_gpu = tuple(prefetched) if prefetched is not None else (0,) * len(tokens)
    assert len(on_gpu) == len(tokens)
    assert not on_gpu or (min(on_gpu) >= 0 and max(on_gpu) <= hidden)
    both = _on_both(tokens, costs, hidden, step, on_gpu)
    cpu = inf if any(on_gpu) else _on_cpu(tokens, costs)
    gpu = _on_gpu(tokens, costs, hidden, on_gpu)
    if min(cpu, gpu) < both.seconds * (1 + margin):
        return Plan(on_gpu, cpu) if cpu <= gpu else Plan((hidden,) * len(tokens), gpu)
    return both


def _on_cpu(tokens: Sequence[int], costs: Costs) -> float:
    """Seconds where the CPU computes everything, and nothing is copied."""
    if costs.cpu_alone is None or not tokens:
        return inf
    seconds_of = {count: min(costs.cpu(count), costs.cpu_alone(count)) for count in set(tokens)}
    return max(sum([seconds_of[count] for count in tokens]) + costs.cpu_start, len(tokens) * costs.memory)


def _on_gpu(tokens: Sequence[int], costs: Costs, hidden: int, on_gpu: Sequence[int]) -> float:
    """Seconds where the GPU computes everything, and the CPU nothing."""
    if costs.copy == inf:
        return inf
    copy = min(costs.copy, costs.copy_alone)
    seconds_of = {count: max(copy, costs.gpu(count)) for count in set(tokens)}
    seconds = sum([seconds_of[count] for count in tokens])
    if any(on_gpu):
        for count, rows in zip(tokens, on_gpu, strict=True):
            if rows:
                seconds -= seconds_of[count] * rows / hidden - (costs.copy_split if rows < hidden else 0.0)
        if min(on_gpu) == hidden:
            return len(tokens) * costs.memory
    return max(seconds + costs.copy_start, len(tokens) * costs.memory) if tokens else 0.0


def _on_both(tokens: Sequence[int], costs: Costs, hidden: int, step: int, on_gpu: Sequence[int]) -> Plan:
    """The cheapest plan in which the CPU has a part: whole experts on the GPU, and at most one split.

    Whole experts move to the GPU while that leaves the CPU the later side: each makes the plan cheaper. The next one is
    left to the CPU, split, or moved as well, whichever costs the least.
    """
    memory = len(tokens) * costs.memory
    rates = {count: (costs.cpu(count) / hidden, max(costs.copy, costs.gpu(count)) / hidden) for count in set(tokens)}
    left = [e for e, rows in enumerate(on_gpu) if rows < hidden]
    cpu, copy = costs.cpu_start, costs.copy_start  # seconds of each side
    for e in left:
        cpu += rates[tokens[e]][0] * (hidden - on_gpu[e]) + (costs.cpu_split if on_gpu[e] else 0.0)
    if costs.copy == inf or not left:
        return Plan(tuple(on_gpu), max(cpu if left else 0.0, memory))
    if len(rates) > 1:
        savings = {count: cpu_row / gpu_row for count, (cpu_row, gpu_row) in rates.items()}
        left.sort(key=lambda e: savings[tokens[e]], reverse=True)
    rows, moved = list(on_gpu), 0
    for e in left:
        cpu_row, gpu_row = rates[tokens[e]]
        rest = hidden - on_gpu[e]
        cpu_next = cpu - cpu_row * rest - (costs.cpu_split if on_gpu[e] else 0.0)
        copy_next = copy + gpu_row * rest + (costs.copy_split if on_gpu[e] else 0.0)
        if cpu_next < copy_next:
            break
        rows[e], cpu, copy = hidden, cpu_next, copy_next
        moved += 1
    else:
        return Plan(tuple(rows), max(copy, memory))
    choices = [(max(cpu, copy if moved else 0.0, memory), 0, cpu - copy)]  # seconds, rows, lead
    cpu_split, copy_split = cpu + (0.0 if on_gpu[e] else costs.cpu_split), copy + costs.copy_split
    balanced = (cpu_split - copy_split) / (cpu_row + gpu_row) / step  # steps at which both sides end together
    for more in (floor(balanced) * step, ceil(balanced) * step):
        if 0 < more < rest:
            cpu_part, copied = cpu_split - cpu_row * more, copy_split + gpu_row * more
            choices.append((max(cpu_part, copied, memory), more, cpu_part - copied))
    if moved + 1 < len(left):  # else the CPU has no part
        choices.append((max(cpu_next, copy_next, memory), rest, cpu_next - copy_next))
    seconds, more, lead = min(choices, key=lambda choice: choice[0])
    rows[e] += more
    return Plan(tuple(rows), seconds, lead)


def plan_with_sums(
    costs: Costs,
    hidden: int,
    step: int,
    sum_experts: float,
    tokens: tuple[int, ...],
    prefetched: tuple[int, ...],
    gpu_delay: float,
    cpu_sums: int,
) -> Plan:
    """`make_plan`, where the CPU also sends the sums of `cpu_sums` tokens, if it has a part.

    step: hidden rows by which experts are split. sum_experts: bytes of one sum over bytes of an expert.
    """
    start = costs.cpu_start + (0.0 if costs.copy == inf else cpu_sums * sum_experts * costs.copy)
    costs = replace(costs, cpu_start=start, copy_start=costs.copy_start + gpu_delay)
    return make_plan(tokens, costs, hidden, step, prefetched, _MARGIN)
