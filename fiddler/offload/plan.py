"""Plans which of CPU and GPU computes a layer's missing experts, or both a part. Pure: knows numbers, not machines.

An expert that is not on the GPU can be computed by the CPU where its weights lie, streamed to the GPU and computed
there, or split: the GPU takes some of its F hidden rows (of gate and up, and columns of down), the CPU the others,
and their sums add. Both sides work at the same time and share the memory bandwidth, so a plan's cost is

    max(cpu start + sum of (1 - s_e) cpu(t_e),                      where the CPU has any part
        copy start + sum of s_e max(copy, gpu(t_e)),                where the GPU has any part
        experts * memory)

for s_e, the GPU's fraction of expert e, which has t_e tokens; all in seconds. Where the CPU has no part, the copies
have the memory to themselves and cost less, as measured alone. The plan is the one with the least cost among those
whose fractions are whole steps of rows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf

__all__ = ["Balance", "Costs", "Curve", "Plan", "make_plan"]


@dataclass(frozen=True)
class Curve:
    """Seconds by number of tokens: straight lines between points, the last one extended."""

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
    """Costs of one whole expert on this machine [s], as `fiddler calibrate` measures them."""

    cpu: Curve  # the CPU computes it
    gpu: Curve  # the GPU computes it
    copy: float  # its weights are copied to the GPU while the CPU computes; `inf` without a GPU
    memory: float  # its weights are read from memory, by both sides together
    cpu_start: float = 0.0  # before the CPU begins, and for the transfer of its result
    copy_start: float = 0.0  # before the first weights move
    copy_alone: float = inf  # `copy` while the CPU does not compute, where that is less


@dataclass(frozen=True)
class Plan:
    """The number of each expert's hidden rows, its last ones, that the GPU computes; and the expected time [s]."""

    gpu_rows: tuple[int, ...]
    seconds: float


class Balance:
    """Delay of the GPU's part after the CPU's [s], adjusted at run time by which side finishes first.

    Calibration cannot know it: queueing copies beside a busy CPU takes time, and the speed of each side varies. The
    delay moves by one small step at a time: it follows changes, and one odd moment moves it little.
    """

    _STEP, _MAX_STEPS = 25e-6, 40

    def __init__(self) -> None:
        self._steps = 0

    @property
    def seconds(self) -> float:
        """The value for `Costs.copy_start`; negative where the GPU is the faster side."""
        return self._steps * self._STEP

    def tell(self, *, gpu_first: bool) -> None:
        """Adjust after a layer in which both sides had a part."""
        self._steps = max(-self._MAX_STEPS, min(self._MAX_STEPS, self._steps + (-1 if gpu_first else 1)))


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
    margin: the CPU is left out where it saves no more than this fraction of the time.
    Exact where streaming costs the same for every expert, that is, where the GPU waits for the copies. Else experts
    go to the GPU in the order of their savings, a good one (Dantzig's for the continuous knapsack), and only the
    rounding to whole steps may miss the best.
    """
    on_gpu = list(prefetched) if prefetched is not None else [0] * len(tokens)
    assert len(on_gpu) == len(tokens)
    assert all(0 <= rows <= hidden for rows in on_gpu)
    memory_seconds = len(tokens) * costs.memory
    cpu = [costs.cpu(count) / hidden for count in tokens]  # seconds a row
    gpu = [max(costs.copy, costs.gpu(count)) / hidden for count in tokens]
    gpu_alone = [max(min(costs.copy, costs.copy_alone), costs.gpu(count)) / hidden for count in tokens]

    def cost(rows: Sequence[int]) -> float:
        cpu_seconds = sum(c * (hidden - r) for c, r in zip(cpu, rows, strict=True))
        row_seconds = gpu if cpu_seconds else gpu_alone
        copy_seconds = sum(g * (r - h) for g, r, h in zip(row_seconds, rows, on_gpu, strict=True) if r > h)
        return max(
            cpu_seconds + costs.cpu_start if cpu_seconds else 0.0,
            copy_seconds + costs.copy_start if copy_seconds else 0.0,
            memory_seconds,
        )

    best, best_seconds = tuple(on_gpu), cost(on_gpu)
    if costs.copy == inf:
        return Plan(best, best_seconds)
    rows = list(on_gpu)
    cpu_seconds = costs.cpu_start + sum(c * (hidden - h) for c, h in zip(cpu, on_gpu, strict=True))
    copy_seconds = costs.copy_start
    for e in sorted(range(len(tokens)), key=lambda e: cpu[e] / gpu[e], reverse=True):
        rest = hidden - on_gpu[e]
        # the rows at which both sides take the same time; a little more or less is worse
        balanced = (cpu_seconds - copy_seconds) / (cpu[e] + gpu[e]) if rest else 0.0
        for steps in {floor(balanced / step), ceil(balanced / step)}:
            rows[e] = on_gpu[e] + min(max(steps * step, 0), rest)
            if (seconds := cost(rows)) < best_seconds:
                best, best_seconds = tuple(rows), seconds
        rows[e] = hidden
        if (seconds := cost(rows)) < best_seconds:
            best, best_seconds = tuple(rows), seconds
        cpu_seconds -= cpu[e] * rest
        copy_seconds += gpu[e] * rest
        if balanced < rest:
            break
    all_on_gpu = (hidden,) * len(tokens)  # saves the CPU's start, too, and the copies have the memory to themselves
    if (seconds := cost(all_on_gpu)) < best_seconds * (1 + margin):
        best, best_seconds = all_on_gpu, seconds
    return Plan(best, best_seconds)
