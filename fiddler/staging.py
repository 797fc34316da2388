"""Where streamed weights wait on the GPU: a ring of slots, each for a part of one expert. Knows no plan.

A slot is filled over the link while the compute stream uses others; it is filled again when its last user is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.experts import ExpertWeights
from fiddler.link import Link, Mark

__all__ = ["Part", "Ring"]


@dataclass(frozen=True)
class Part:
    """Hidden rows [begin, end) of one expert: on the GPU once `arrived` is reached."""

    expert: int
    begin: int
    end: int
    gate: Tensor  # [rows, D]
    up: Tensor  # [rows, D]
    down: Tensor  # [D, rows]
    arrived: Mark
    slot: int


class Ring:
    """`slots` slots of `rows` hidden rows each, for experts of `width` D and 16-bit weights of `dtype`."""

    def __init__(self, link: Link, width: int, rows: int, slots: int, dtype: torch.dtype) -> None:
        self.link = link
        self.rows = rows
        self.slots = slots
        self._width = width
        self._memory = torch.empty(slots, 3, rows * width, dtype=dtype, device=link.device)
        self._arrived = [link.mark() for _ in range(slots)]
        self._free = [link.mark() for _ in range(slots)]
        self._taken = [False] * slots
        self._next = 0

    @staticmethod
    def nbytes(width: int, rows: int, slots: int) -> int:
        """Bytes of the GPU's memory that such a ring takes."""
        return slots * 3 * rows * width * 2

    def send(self, weights: ExpertWeights, expert: int, begin: int, end: int) -> Iterator[Part]:
        """Start sending rows [begin, end) of an expert, in parts that fit a slot.

        Each part is to be handed to `done`, at the latest before `slots` more are sent.
        """
        while begin < end:
            last = min(begin + self.rows, end)
            yield self._send(weights, expert, begin, last)
            begin = last

    def _send(self, weights: ExpertWeights, expert: int, begin: int, end: int) -> Part:
        slot, self._next = self._next, (self._next + 1) % self.slots
        assert not self._taken[slot], "a slot is filled again before its part was done with"
        self._taken[slot] = True
        self.link.hold(self._free[slot])
        rows = end - begin
        gate, up, down = (matrix[: rows * self._width] for matrix in self._memory[slot])
        gate, up, down = gate.view(rows, self._width), up.view(rows, self._width), down.view(self._width, rows)
        self.link.copy(gate, weights.gate[expert, begin:end])
        self.link.copy(up, weights.up[expert, begin:end])
        self.link.copy(down, weights.down[expert, :, begin:end])
        self.link.arrive(self._arrived[slot])
        return Part(expert, begin, end, gate, up, down, self._arrived[slot], slot)

    def done(self, part: Part) -> None:
        """The compute stream has been given all that uses `part`."""
        self._free[part.slot].record()
        self._taken[part.slot] = False

    def release(self) -> None:
        """Nobody uses what is in the slots any more: a step that was broken off left parts behind."""
        for slot in range(self.slots):
            if self._taken[slot]:
                self._free[slot].record()
                self._taken[slot] = False
