"""Staging memory for streamed weights on the GPU: a ring of slots, each for a part of one expert. Knows no plan.

A copy fills a slot while the compute stream reads others; the next copy into it waits for its last reader.
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

_SPARE = 2048  # bytes: matrices that are sent together begin at multiples of 16 bytes


@dataclass(frozen=True)
class Part:
    """Hidden rows [begin, end) of one expert: on the GPU once `arrived` is reached."""

    expert: int
    begin: int
    end: int
    arrived: Event
    slot: int
    memory: Tensor  # bytes [3, those of one matrix of a slot]
    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows] in `memory`

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
        self._formats = [w.format for w in layers]
        size = self.nbytes(layers, rows, slots)
        self._allocation = torch.empty(size + _SPARE, dtype=torch.uint8, device=weight_copy.device)
        self._memory = self._allocation[:size].view(slots, 3, -1)
        self._addresses = [tuple(matrix.data_ptr() for matrix in slot) for slot in self._memory]
        self._arrived = [weight_copy.event() for _ in range(slots)]
        self._free = [weight_copy.event() for _ in range(slots)]
        self._in_use = [False] * slots
        self._next = 0

    @staticmethod
    def nbytes(layers: Sequence[ExpertWeights], rows: int, slots: int) -> int:
        """GPU memory of such a ring [bytes]."""
        return slots * rows * max(weights.hidden_row_bytes for weights in layers)

    def send(self, layer: int, expert: int, begin: int, end: int) -> Iterator[Part]:
        """Start copying rows [begin, end) of an expert to the GPU, in parts that fit a slot.

        Pass each part to `done` before `slots` more are sent.
        """
        while begin < end:
            last = min(begin + self.rows, end)
            yield self._send(layer, expert, begin, last)
            begin = last

    def _send(self, layer: int, expert: int, begin: int, end: int) -> Part:
        slot, self._next = self._next, (self._next + 1) % self.slots
        assert not self._in_use[slot], "a slot is filled again before its part was done with"
        self._in_use[slot] = True
        weight_copy, rows, hidden, width = self.weight_copy, end - begin, self._hidden, self._width
        weight_copy.hold(self._free[slot])
        (gate, up, down), (to_gate, to_up, to_down) = self._mapped[layer], self._addresses[slot]
        row_bytes = self._formats[layer].row_bytes
        size, pitch = rows * row_bytes(width), row_bytes(hidden)
        row = (expert * hidden + begin) * row_bytes(width)
        columns = down + expert * width * pitch + row_bytes(begin)
        with self._recorder.queued("copy", 3 * size, weight_copy.stream):
            weight_copy.copy(to_gate, gate + row, size)
            weight_copy.copy(to_up, up + row, size)
            weight_copy.copy(to_down, columns, row_bytes(rows), width, pitch)
        weight_copy.arrive(self._arrived[slot])
        addresses = to_gate, to_up, to_down
        return Part(expert, begin, end, self._arrived[slot], slot, self._memory[slot], addresses, width)

    def send_together(self, layer: int, row_ranges: Sequence[tuple[int, int, int]]) -> list[Part]:
        """Start copying several (expert, begin, end) that fit the ring together; to be followed by `done_together`.

        They lie one after the other instead of each in slots of its own: fewer copies, and one event for all.
        """
        assert not any(self._in_use)
        weight_copy, hidden, width = self.weight_copy, self._hidden, self._width
        for free in self._free:
            weight_copy.hold(free)
        row_bytes = self._formats[layer].row_bytes
        pitch = row_bytes(hidden)
        parts, address = [], self._memory.data_ptr()
        for expert, begin, end in row_ranges:
            (gate, up, down), size = self._mapped[layer], (end - begin) * row_bytes(width)
            row = (expert * hidden + begin) * row_bytes(width)
            aligned = -(-size // 16) * 16
            addresses = address, address + aligned, address + 2 * aligned
            columns = down + expert * width * pitch + row_bytes(begin)
            with self._recorder.queued("copy", 3 * size, weight_copy.stream):
                weight_copy.copy(addresses[0], gate + row, size)
                weight_copy.copy(addresses[1], up + row, size)
                weight_copy.copy(addresses[2], columns, row_bytes(end - begin), width, pitch)
            parts.append(Part(expert, begin, end, self._arrived[0], 0, self._memory, addresses, width))
            address += 3 * aligned
        assert address <= self._allocation.data_ptr() + self._allocation.nbytes
        weight_copy.arrive(self._arrived[0])
        return parts

    def done_together(self) -> None:
        """Free the ring when the compute stream has done its work so far: all that reads `send_together`'s parts."""
        for free in self._free:
            free.record()

    def done(self, part: Part) -> None:
        """Free the slot of `part` when the compute stream has done its work so far: all that reads `part`."""
        self._free[part.slot].record()
        self._in_use[part.slot] = False

    def release(self) -> None:
        """Free all slots, after a step that was broken off: it left parts behind that nobody reads."""
        for slot in range(self.slots):
            if self._in_use[slot]:
                self._free[slot].record()
                self._in_use[slot] = False


SLOTS = 3  # of the ring: one is being filled, one is ready, one is read


def slot_rows(hidden: int) -> int:
    """Hidden rows of a slot, such that the ring holds one whole expert."""
    return -(-hidden // (64 * SLOTS)) * 64
