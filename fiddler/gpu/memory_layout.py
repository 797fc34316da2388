"""What fits on the GPU, and which experts live there. Pure: knows bytes and how popular experts are, not devices."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Layout", "Sizes", "lay_out", "least_room"]

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
