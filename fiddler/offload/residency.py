"""Which experts are resident on the GPU. Pure: knows how often experts were chosen, not devices."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["place"]


def place(layers: int, experts: int, room: int, counts: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """The experts of each layer that become residents, `room` in all (or every expert, where that is fewer).

    counts: how often each expert of each layer was chosen, [L][E]: then those that were chosen most often, of any
    layer. Without them no expert is better than another, and every layer gets the same number, give or take one:
    a layer without residents would be the slowest of all. The layers that get one more are spread over the model.
    """
    room = min(max(room, 0), layers * experts)
    chosen: list[list[int]] = [[] for _ in range(layers)]
    if counts is not None:
        # among experts chosen equally often, those of layers that have fewer residents so far: round after round
        ranked = [sorted(range(experts), key=lambda e: -row[e]) for row in counts]
        order = sorted(
            ((-counts[layer][e], rank, layer, e) for layer in range(layers) for rank, e in enumerate(ranked[layer]))
        )
        for _, _, layer, e in order[:room]:
            chosen[layer].append(e)
        return [sorted(row) for row in chosen]
    for layer in range(layers):
        share = (layer + 1) * room // layers - layer * room // layers
        chosen[layer] = list(range(share))
    return chosen
