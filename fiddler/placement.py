"""Which experts live on the GPU. Pure: knows numbers of bytes and how popular experts are, not devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fiddler.errors import RequestError

__all__ = ["place", "read_counts"]


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


def read_counts(path: Path, layers: int, experts: int) -> list[list[int]]:
    """Expert counts of a file as `fiddler perplexity --expert-counts` writes them: JSON, {"counts": [L][E]}.

    Raises RequestError, in one line that names the file, where it is no such file or is of another model's shape.
    """
    try:
        counts: list[list[int]] = json.loads(path.read_text())["counts"]
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RequestError(
            f'{path}: is no file of expert counts; it is JSON, {{"counts": [layers][experts]}}'
        ) from None
    shaped = isinstance(counts, list) and all(
        isinstance(row, list) and all(type(count) is int and count >= 0 for count in row) for row in counts
    )
    if not shaped or {len(row) for row in counts} != {experts} or len(counts) != layers:
        raise RequestError(f"{path}: does not hold counts of {layers} layers with {experts} experts each")
    return counts
