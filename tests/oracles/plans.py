"""Plans the slow way: the cost of a plan written out, every possible plan, and a greedy search that tries each step."""

from __future__ import annotations

from itertools import product


def cost(tokens, rows, costs, ahead, hidden):
    """The cost of a plan as `plan` defines it [s], written out independently."""
    cpu = gpu = 0.0
    copied = any(r > a for r, a in zip(rows, ahead, strict=True))
    on_cpu = any(r < hidden for r in rows)
    copy = costs.copy if on_cpu else min(costs.copy, costs.copy_alone)
    for t, r, a in zip(tokens, rows, ahead, strict=True):
        seconds = costs.cpu(t)
        if costs.cpu_alone is not None and not any(rows):
            seconds = min(seconds, costs.cpu_alone(t))
        cpu += seconds * (hidden - r) / hidden + (costs.cpu_split if 0 < r < hidden else 0.0)
        if r > a:
            gpu += max(copy, costs.gpu(t)) * (r - a) / hidden + (costs.copy_split if r - a < hidden else 0.0)
    return max(
        cpu + costs.cpu_start if on_cpu else 0, gpu + costs.copy_start if copied else 0, costs.memory * len(tokens)
    )


def brute_force(tokens, costs, step, ahead, hidden):
    """The least cost of all plans."""
    choices = [sorted({*range(a, hidden + 1, step), hidden}) for a in ahead]
    return min(cost(tokens, rows, costs, ahead, hidden) for rows in product(*choices))


def greedy(tokens, costs, step, ahead, hidden):
    """The least cost of all plans that give the GPU the experts which save the most, and rows of the next one.

    Every whole number of steps of that one is tried, after every number of whole experts.
    """
    saving = [costs.cpu(t) / max(costs.copy, costs.gpu(t)) for t in tokens]
    rows = list(ahead)
    least = min(cost(tokens, choice, costs, ahead, hidden) for choice in (ahead, [hidden] * len(tokens)))
    for e in sorted(range(len(tokens)), key=lambda e: saving[e], reverse=True):
        for count in [*range(ahead[e], hidden + 1, step), hidden]:
            rows[e] = count
            least = min(least, cost(tokens, rows, costs, ahead, hidden))
    return least
