"""Selects the experts that are resident on the GPU. Pure: knows how often experts were chosen, not devices."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["place"]


def place(
    layers: int, experts: int, max_residents: int, counts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """The resident experts of each layer, `max_residents` in all (or every expert, where there are fewer).

    counts: how often each expert of each layer was chosen, [L][E]. With counts: the experts that were chosen most
    often, of any layer. Without: the same number in every layer, give or take one, since a layer without residents
    would be the slowest of all. The layers that get one more are spread over the model.
    """
    max_residents = min(max(max_residents, 0), layers * experts)
    residents: list[list[int]] = [[] for _ in range(layers)]
    if counts is not None:
        # ties go to layers with fewer residents so far: the best expert of each layer, then the second best, ...
        ranked = [sorted(range(experts), key=lambda e: -row[e]) for row in counts]
        order = sorted(
            ((-counts[layer][e], rank, layer, e) for layer in range(layers) for rank, e in enumerate(ranked[layer]))
        )
        for _, _, layer, e in order[:max_residents]:
            residents[layer].append(e)
        return [sorted(row) for row in residents]
    for layer in range(layers):
        count = (layer + 1) * max_residents // layers - layer * max_residents // layers
        residents[layer] = list(range(count))
    return residents
