"""Selects the experts that are resident on the GPU, and evicted ones. Pure: knows how often each was chosen."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["least_valuable", "place", "within"]


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


def within(
    placed: Sequence[Sequence[int]],
    sizes: Sequence[int],
    max_bytes: int,
    counts: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The experts of `placed` that take at most `max_bytes`: without those of least value, where sizes differ.

    sizes: of an expert of each layer [bytes]. counts: see `place`.
    """
    residents = [list(experts) for experts in placed]
    counts = counts if counts is not None else [[0] * (max(experts, default=0) + 1) for experts in residents]
    nbytes = sum(len(experts) * size for experts, size in zip(residents, sizes, strict=True))
    while nbytes > max_bytes:
        least = least_valuable(residents, counts, [False] * len(residents))
        if least is None:
            break
        residents[least[0]].remove(least[1])
        nbytes -= sizes[least[0]]
    return residents


def least_valuable(
    residents: Sequence[Sequence[int]], counts: Sequence[Sequence[int]], fixed: Sequence[bool]
) -> tuple[int, int] | None:
    """The layer and id of the resident whose absence costs the least time; None where there is none.

    Experts of one size save the same time whenever they are chosen. So the value is how often that was, by `counts`
    [L][E]; of equal ones, the last of the layer with the most residents. fixed: [L], layers that keep all of theirs.
    """
    ranked = (
        (counts[layer][e], -len(experts), layer, -e)
        for layer, experts in enumerate(residents)
        if not fixed[layer]
        for e in experts
    )
    least = min(ranked, default=None)
    return None if least is None else (least[2], -least[3])
