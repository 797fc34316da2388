"""Who computes a layer's missing experts: the CPU, the GPU, or both a part. Pure: knows numbers, not machines.

An expert that is not on the GPU can be computed by the CPU where its weights lie, streamed over the link and
computed by the GPU, or be split: the GPU takes some of its F hidden rows (of gate and up, and columns of down), the
CPU the others, and their sums add. Both sides work at the same time and share the memory, so a plan's cost is

    max(cpu start + sum of (1 - s_e) cpu(t_e),                      where the CPU has any part
        link start + sum of s_e max(link, gpu(t_e)),                where the GPU has any part
        experts * memory)

for s_e, the GPU's share of expert e, which has t_e tokens; all in seconds. Where the CPU has no part the link has the
memory to itself, and its cost is then the lower one that it has alone. The plan is the one with the least cost among
those whose shares are whole steps of rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf

__all__ = ["Balance", "Costs", "Curve", "Plan", "make_plan"]


@dataclass(frozen=True)
class Curve:
    """Seconds against a number of tokens: straight lines between points, the last one carried on."""

    tokens: tuple[int, ...]  # ascending, the first is 1
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.seconds) >= 1
        assert list(self.tokens) == sorted(set(self.tokens))

    def __call__(self, count: int) -> float:
        """Seconds for `count` tokens."""
        if len(self.tokens) == 1 or count <= self.tokens[0]:
            return self.seconds[0]
        right = min(bisect_left(self.tokens, count), len(self.tokens) - 1)
        (t0, t1), (s0, s1) = self.tokens[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return s0 + (s1 - s0) * (count - t0) / (t1 - t0)


@dataclass(frozen=True)
class Costs:
    """What one whole expert costs on this machine, in seconds, as `calibrate` measures it."""

    cpu: Curve  # the CPU computes it
    gpu: Curve  # the GPU computes it
    copy: float  # its weights go over the link while the CPU computes; `inf` where there is none to use
    memory: float  # the memory gives its weights, to both sides together
    cpu_start: float = 0.0  # before the CPU begins, and handing over its result
    copy_start: float = 0.0  # before the first weights move
    copy_alone: float = inf  # what `copy` is while the CPU does not compute, where that is less


@dataclass(frozen=True)
class Plan:
    """For each expert the number of its last hidden rows that are the GPU's; and what it should take, in seconds."""

    gpu_rows: tuple[int, ...]
    seconds: float


class Balance:
    """How much later than the CPU the GPU begins its part, found while running, by who of the two is done first.

    What calibration cannot know: how long the copies take to be queued beside a busy CPU, and how fast each side is
    today. A step at a time, so that it follows what changes and one odd moment moves it little.
    """

    _STEP, _MOST = 25e-6, 40

    def __init__(self) -> None:
        self._steps = 0

    @property
    def seconds(self) -> float:
        """To be taken for the `copy_start` of `Costs`; negative where the GPU is the faster one."""
        return self._steps * self._STEP

    def tell(self, *, gpu_first: bool) -> None:
        """Who was done first where both had a part."""
        self._steps = max(-self._MOST, min(self._MOST, self._steps + (-1 if gpu_first else 1)))


def make_plan(
    tokens: Sequence[int],
    costs: Costs,
    hidden: int,
    step: int,
    ahead: Sequence[int] | None = None,
    margin: float = 0.0,
) -> Plan:
    """The cheapest plan for missing experts with these numbers of tokens, each at least 1.

    hidden: F, the rows of an expert; the GPU's are a multiple of `step`, or all.
    ahead: rows of each expert that are on the GPU, or on their way, already; they stay there and cost nothing.
    margin: the CPU is left out where it saves no more than this share of the time.
    Exact where streaming an expert costs the same for every expert, that is, where the link is what the GPU waits
    for; else the order in which experts are given to the GPU, by what that saves, is a good one (Dantzig's for the
    continuous knapsack), and only the rounding to whole steps may miss the best.
    """
    have = list(ahead) if ahead is not None else [0] * len(tokens)
    assert len(have) == len(tokens)
    assert all(0 <= rows <= hidden for rows in have)
    floor_seconds = len(tokens) * costs.memory
    cpu = [costs.cpu(count) / hidden for count in tokens]  # a row
    gpu = [max(costs.copy, costs.gpu(count)) / hidden for count in tokens]
    gpu_alone = [max(min(costs.copy, costs.copy_alone), costs.gpu(count)) / hidden for count in tokens]

    def cost(rows: Sequence[int]) -> float:
        on_cpu = sum(c * (hidden - r) for c, r in zip(cpu, rows, strict=True))
        a_row = gpu if on_cpu else gpu_alone
        moved = sum(g * (r - h) for g, r, h in zip(a_row, rows, have, strict=True) if r > h)
        return max(
            on_cpu + costs.cpu_start if on_cpu else 0.0,
            moved + costs.copy_start if moved else 0.0,
            floor_seconds,
        )

    best = tuple(have)
    least = cost(best)
    if costs.copy == inf:
        return Plan(best, least)
    order = sorted(range(len(tokens)), key=lambda e: cpu[e] / gpu[e], reverse=True)
    rows = list(have)
    on_cpu = costs.cpu_start + sum(c * (hidden - h) for c, h in zip(cpu, have, strict=True))
    moved = costs.copy_start
    for e in order:
        free = hidden - have[e]
        # the share of what is left at which both sides take the same time; a little more or less is worse
        even = (on_cpu - moved) / (cpu[e] + gpu[e]) if free else 0.0
        for steps in {floor(even / step), ceil(even / step)}:
            rows[e] = have[e] + min(max(steps * step, 0), free)
            if (seconds := cost(rows)) < least:
                best, least = tuple(rows), seconds
        rows[e] = hidden
        if (seconds := cost(rows)) < least:
            best, least = tuple(rows), seconds
        on_cpu -= cpu[e] * free
        moved += gpu[e] * free
        if even < free:
            break
    everything = (hidden,) * len(tokens)  # the CPU's start is spared, too, and the link has the memory to itself
    if (seconds := cost(everything)) < least * (1 + margin):
        best, least = everything, seconds
    return Plan(best, least)
