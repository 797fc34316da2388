"""What fits on the GPU, and which experts live there. Pure: knows bytes and how popular experts are, not devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fiddler.errors import RequestError

__all__ = ["Layout", "Sizes", "lay_out", "least_room", "place", "read_counts"]

_CHUNKS = (4096, 2048, 1024, 512, 256, 128)  # tokens of one step
_ACTIVATIONS = 0.1  # the share of the room that a step's activations may take, where there is a choice


@dataclass(frozen=True)
class Sizes:
    """Bytes that a model takes on a GPU."""

    fixed: int  # whatever else is there: dense weights, keys and values, temporaries
    token: int  # activations of a token of a step
    slots: int  # for weights that pass through
    expert: int
    experts: int  # how many there are
    context: int  # tokens; no step is longer


@dataclass(frozen=True)
class Layout:
    """What fits: steps of `chunk` tokens, so many experts, and slots, unless all experts are there."""

    chunk: int
    residents: int
    slots: bool


def _chunks(sizes: Sizes) -> list[int]:
    return sorted({min(chunk, sizes.context) for chunk in _CHUNKS}, reverse=True)


def lay_out(room: int, sizes: Sizes, most: int) -> Layout | None:
    """The layout for so many bytes, with at most `most` experts; None where there is none.

    Every expert where that is possible at all; then steps as long as a share of the room allows, shorter ones where
    else nothing would fit.
    """
    least = _chunks(sizes)[-1]
    chunks = [chunk for chunk in _chunks(sizes) if chunk * sizes.token <= _ACTIVATIONS * room or chunk == least]
    left = {chunk: room - sizes.fixed - chunk * sizes.token for chunk in chunks}
    for chunk in chunks:
        if most >= sizes.experts and left[chunk] >= sizes.experts * sizes.expert:
            return Layout(chunk, sizes.experts, slots=False)
    for chunk in chunks:
        if left[chunk] >= sizes.slots:
            return Layout(chunk, min(most, (left[chunk] - sizes.slots) // sizes.expert), slots=True)
    return None


def least_room(sizes: Sizes) -> int:
    """Bytes from which on there is a layout."""
    others = min(sizes.slots, sizes.experts * sizes.expert)
    return sizes.fixed + _chunks(sizes)[-1] * sizes.token + others


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
