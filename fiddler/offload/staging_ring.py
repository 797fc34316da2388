"""Where streamed weights wait on the GPU: a ring of slots, each for a part of one expert. Knows no plan.

A slot is filled over the link while the compute stream uses others; it is filled again when its last user is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fiddler.device.weight_copy import Event, WeightCopy
from fiddler.files.weights import ExpertWeights
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["SLOTS", "Part", "Ring", "slot_rows"]

_SPARE = 1024  # elements, for what is sent together to begin at multiples of 16 bytes


@dataclass(frozen=True)
class Part:
    """Hidden rows [begin, end) of one expert: on the GPU once `arrived` is reached."""

    expert: int
    begin: int
    end: int
    arrived: Event
    slot: int
    memory: Tensor  # [3, slot rows * D], 16 bits
    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows] in it

    width: int  # D

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up [rows, D] and down [D, rows]."""
        rows, width = self.end - self.begin, self.width
        gate, up, down = self.memory.view(dtype)[:, : rows * width]
        return gate.view(rows, width), up.view(rows, width), down.view(width, rows)


class Ring:
    """`slots` slots of `rows` hidden rows each, for these layers' experts."""

    def __init__(
        self,
        weight_copy: WeightCopy,
        layers: Sequence[ExpertWeights],
        rows: int,
        slots: int,
        recorder: Recorder = SILENT,
    ) -> None:
        self.weight_copy = weight_copy
        self._recorder = recorder
        self.rows = rows
        self.slots = slots
        _, self._hidden, self._width = layers[0].gate.shape
        self._mapped = [tuple(bits.ctypes.data for bits in (w.gate, w.up, w.down)) for w in layers]
        size = slots * 3 * rows * self._width
        self._whole = torch.empty(size + _SPARE, dtype=torch.bfloat16, device=weight_copy.device)
        self._memory = self._whole[:size].view(slots, 3, rows * self._width)
        self._addresses = [tuple(matrix.data_ptr() for matrix in slot) for slot in self._memory]
        self._arrived = [weight_copy.event() for _ in range(slots)]
        self._free = [weight_copy.event() for _ in range(slots)]
        self._taken = [False] * slots
        self._next = 0

    @staticmethod
    def nbytes(width: int, rows: int, slots: int) -> int:
        """Bytes of the GPU's memory that such a ring takes."""
        return slots * 3 * rows * width * 2

    def send(self, layer: int, expert: int, begin: int, end: int) -> Iterator[Part]:
        """Start sending rows [begin, end) of an expert, in parts that fit a slot.

        Each part is to be handed to `done`, at the latest before `slots` more are sent.
        """
        while begin < end:
            last = min(begin + self.rows, end)
            yield self._send(layer, expert, begin, last)
            begin = last

    def _send(self, layer: int, expert: int, begin: int, end: int) -> Part:
        slot, self._next = self._next, (self._next + 1) % self.slots
        assert not self._taken[slot], "a slot is filled again before its part was done with"
        self._taken[slot] = True
        weight_copy, rows, hidden, width = self.weight_copy, end - begin, self._hidden, self._width
        weight_copy.hold(self._free[slot])
        (gate, up, down), (to_gate, to_up, to_down) = self._mapped[layer], self._addresses[slot]
        row = 2 * width * (expert * hidden + begin)
        with self._recorder.queued("link", 6 * width * rows, weight_copy.stream):
            weight_copy.copy(to_gate, gate + row, 2 * width * rows)
            weight_copy.copy(to_up, up + row, 2 * width * rows)
            weight_copy.copy(to_down, down + 2 * (expert * width * hidden + begin), 2 * rows, width, 2 * hidden)
        weight_copy.arrive(self._arrived[slot])
        addresses = to_gate, to_up, to_down
        return Part(expert, begin, end, self._arrived[slot], slot, self._memory[slot], addresses, width)

    def send_together(self, layer: int, wanted: Sequence[tuple[int, int, int]]) -> list[Part]:
        """Start sending (expert, begin, end), which together fill no more than all slots; to be `done_together`.

        One after the other instead of each in slots of its own: fewer copies, and one mark for all.
        """
        assert not any(self._taken)
        weight_copy, hidden, width = self.weight_copy, self._hidden, self._width
        for free in self._free:
            weight_copy.hold(free)
        parts, at = [], self._memory.data_ptr()
        for expert, begin, end in wanted:
            (gate, up, down), size = self._mapped[layer], 2 * width * (end - begin)
            row = 2 * width * (expert * hidden + begin)
            aligned = -(-size // 16) * 16
            addresses = at, at + aligned, at + 2 * aligned
            columns = down + 2 * (expert * width * hidden + begin)
            with self._recorder.queued("link", 3 * size, weight_copy.stream):
                weight_copy.copy(addresses[0], gate + row, size)
                weight_copy.copy(addresses[1], up + row, size)
                weight_copy.copy(addresses[2], columns, 2 * (end - begin), width, 2 * hidden)
            parts.append(Part(expert, begin, end, self._arrived[0], 0, self._memory, addresses, width))
            at += 3 * aligned
        assert at <= self._whole.data_ptr() + self._whole.nbytes
        weight_copy.arrive(self._arrived[0])
        return parts

    def done_together(self) -> None:
        """The compute stream has been given all that uses what was sent together."""
        for free in self._free:
            free.record()

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


SLOTS = 3  # of the ring: one is filled while one is used, and one is ready


def slot_rows(hidden: int) -> int:
    """Hidden rows of a slot: a whole expert fills the ring."""
    return -(-hidden // (64 * SLOTS)) * 64
