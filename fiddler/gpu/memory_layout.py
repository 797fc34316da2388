"""How much of a model fits on the GPU: experts, chunk length, slots. Pure: knows bytes; not devices or expert ids."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["FirstBlocks", "Layout", "Sizes", "first_blocks", "lay_out", "least_room"]

_CHUNKS = (4096, 2048, 1024, 512, 256, 128)  # tokens per step
_ACTIVATION_FRACTION = 0.1  # of the room, for a step's activations where a shorter chunk is possible


@dataclass(frozen=True)
class Sizes:
    """Memory that a model takes on a GPU [bytes], its number of experts, and its context [tokens]."""

    fixed: int  # dense weights, KV cache, temporaries
    token: int  # activations per token of a step
    slots: int  # the staging ring of streamed weights
    expert: int  # per expert; the mean where layers are stored differently
    experts: int  # number of experts in all layers
    context: int  # tokens; no step is longer


@dataclass(frozen=True)
class Layout:
    """Steps of `chunk` tokens, `residents` experts on the GPU, and slots for the others unless all are there."""

    chunk: int
    residents: int
    slots: bool


@dataclass(frozen=True)
class FirstBlocks:
    """Blocks of keys and values that a model begins with, and what that asks of its layout."""

    blocks: int
    later: int  # bytes by which one sequence of the whole context lets them grow, at the cost of residents
    spare: int  # bytes to leave, since they grow by segments
    chunk: int  # the most tokens of a step
    max_residents: int


def first_blocks(
    room: int,
    sizes: Sizes,
    max_residents: int,
    blocks: tuple[int, int],
    block_bytes: int,
    segment_bytes: int,
    layers: int | None,
) -> FirstBlocks:
    """Whether there is memory for the keys and values of a whole context from the start.

    Not where some experts of every layer are missing then: more are resident as long as sequences are short. They give
    their memory back, so they complete no layer, and their places are divided evenly. room, sizes: without keys and
    values. blocks: the least, and those of the whole context. layers: with experts; None where residents may not do so.
    """
    least, whole = blocks
    later, fixed = (whole - least) * block_bytes, sizes.fixed + whole * block_bytes
    layout, spared = (lay_out(room, replace(sizes, fixed=fixed + more), max_residents) for more in (0, segment_bytes))
    if layers is None or later <= segment_bytes or layout is None or spared is None:
        return FirstBlocks(whole, 0, 0, sizes.context, max_residents)
    if not layout.slots or layout.residents > sizes.experts - layers:
        return FirstBlocks(whole, 0, 0, sizes.context, max_residents)
    return FirstBlocks(least, later, segment_bytes, spared.chunk, min(max_residents, sizes.experts - layers))


def _chunks(sizes: Sizes) -> list[int]:
    return sorted({min(chunk, sizes.context) for chunk in _CHUNKS}, reverse=True)


def lay_out(room: int, sizes: Sizes, max_residents: int) -> Layout | None:
    """The layout for `room` [bytes] with at most `max_residents` experts on the GPU; None where nothing fits.

    All experts go first, where they fit with any chunk. Chunks are as long as `_ACTIVATION_FRACTION` of the room
    allows, shorter where nothing else fits.
    """
    shortest = _chunks(sizes)[-1]
    chunks = [c for c in _chunks(sizes) if c * sizes.token <= _ACTIVATION_FRACTION * room or c == shortest]
    left = {chunk: room - sizes.fixed - chunk * sizes.token for chunk in chunks}
    for chunk in chunks:
        if max_residents >= sizes.experts and left[chunk] >= sizes.experts * sizes.expert:
            return Layout(chunk, sizes.experts, slots=False)
    for chunk in chunks:
        if left[chunk] >= sizes.slots:
            return Layout(chunk, min(max_residents, (left[chunk] - sizes.slots) // sizes.expert), slots=True)
    return None


def least_room(sizes: Sizes) -> int:
    """The smallest room [bytes] for which there is a layout."""
    expert_bytes = min(sizes.slots, sizes.experts * sizes.expert)
    return sizes.fixed + _chunks(sizes)[-1] * sizes.token + expert_bytes
