"""Staging memory for streamed weights on the GPU: a ring of slots. Knows no plan.

A slot holds a part of one large expert, or several small ones, one after the other. Copies fill a slot while the
compute stream reads others; the next ones into it wait for its last reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fiddler.device.weight_copy import Event, WeightCopy
from fiddler.files.weights import ExpertWeights
from fiddler.kernels.formats.weight_format import WeightFormat
from fiddler.kernels.one_token import TokenDivision
from fiddler.kernels.token_copies import Layout, TokenCopies
from fiddler.offload.feed_forward import Matrix, matrix_in
from fiddler.telemetry.recorder import SILENT, Recorder

__all__ = ["SLOTS", "Part", "Ring", "RowRange", "in_slots", "slot_rows"]

_MOST_PARTS = 32  # of a slot
_SPARE = 48 * _MOST_PARTS  # bytes of a slot: the matrices of its parts begin at multiples of 16 bytes

RowRange = tuple[int, int, int]
"""An expert, and the first and the end of its hidden rows."""


class Part(NamedTuple):
    """Hidden rows [begin, end) of one expert: on the GPU once `arrived` is reached."""

    expert: int
    begin: int
    end: int
    arrived: Event
    slot: int
    memory: Tensor  # bytes of the ring
    addresses: tuple[int, int, int]  # of gate [rows, D], up [rows, D] and down [D, rows] in `memory`
    width: int  # D
    formats: tuple[WeightFormat, WeightFormat, WeightFormat]

    def matrices(self) -> tuple[Matrix, Matrix, Matrix]:
        """gate, up [rows, D] and down [D, rows]."""
        rows, width, first = self.end - self.begin, self.width, self.memory.data_ptr()
        shapes = (rows, width), (rows, width), (width, rows)
        gate, up, down = (
            matrix_in(self.memory, at - first, *shape, kind)
            for at, shape, kind in zip(self.addresses, shapes, self.formats, strict=True)
        )
        return gate, up, down


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
        _, self._hidden, self._width = layers[0].shape
        # addresses of gate, up and down of each layer's experts
        self._mapped = [tuple(each.addresses.tolist() for each in (w.gate, w.up, w.down)) for w in layers]
        self._formats = [w.matrix_formats for w in layers]
        self._memory = torch.empty(self.nbytes(layers, rows, slots), dtype=torch.uint8, device=weight_copy.device)
        self._slot_bytes = self._memory.nbytes // slots
        self._arrived = [weight_copy.event() for _ in range(slots)]
        self._free = [weight_copy.event() for _ in range(slots)]
        self._token_read, self._token = weight_copy.event(), False  # whether the last copies were a token's
        self._in_use = [False] * slots
        self._next = 0

    @staticmethod
    def nbytes(layers: Sequence[ExpertWeights], rows: int, slots: int) -> int:
        """GPU memory of such a ring [bytes]."""
        slot_bytes = rows * max(weights.hidden_row_bytes for weights in layers) + _SPARE
        return slots * -(-slot_bytes // 16) * 16

    def send(self, layer: int, row_ranges: Sequence[RowRange]) -> Iterator[list[Part]]:
        """Start copying hidden rows of different experts to the GPU; yields the parts of one slot after the other.

        Pass each list to `done` before `slots` more are sent.
        """
        if self._token:  # what reads the token's parts is queued
            self._token_read.record()
            self.weight_copy.hold(self._token_read)
            self._token = False
        for parts in in_slots(row_ranges, self.rows):
            slot, self._next = self._next, (self._next + 1) % self.slots
            assert not self._in_use[slot], "a slot is filled again before its parts were done with"
            self._in_use[slot] = True
            self.weight_copy.hold(self._free[slot])
            yield self._copy(layer, parts, slot, self._slot_bytes)

    def token_copies(self, division: TokenDivision, jobs: np.ndarray, device_jobs: int) -> TokenCopies:
        """Copies of what `division` leaves to the GPU, into this ring. See `TokenCopies`; and `begin_token`."""
        layouts = [
            Layout(
                np.array(matrices),
                (gate.row_bytes(self._width), up.row_bytes(self._width)),
                (down.block_length, down.block_bytes),
            )
            for matrices, (gate, up, down) in zip(self._mapped, self._formats, strict=True)
        ]
        memory = self._memory.data_ptr(), self._memory.nbytes
        functions = self.weight_copy.c_functions()
        return TokenCopies(division, layouts, self._width, memory, self.token_rows, functions, jobs, device_jobs)

    @property
    def token_rows(self) -> int:
        """Hidden rows of one token's experts that the ring holds at once."""
        return self.rows * self.slots

    def token_chunks(self, k: int) -> int:
        """The most chunks in which the ring holds the experts of one token, which has k."""
        return TokenCopies.chunks(k, self._hidden, self.token_rows)

    def begin_token(self) -> None:
        """Make the copies of a token, which use the whole ring, wait for all readers of its slots."""
        assert not any(self._in_use)
        if not self._token:
            for free in self._free:
                self.weight_copy.hold(free)
        self._token = True

    def _copy(self, layer: int, row_ranges: Sequence[RowRange], slot: int, room: int) -> list[Part]:
        """Start copying rows to where a slot begins, one expert after the other, and set the slot's event."""
        weight_copy, hidden, width, formats = self.weight_copy, self._hidden, self._width, self._formats[layer]
        copy, (gate, up, down), of_down = weight_copy.copy, self._mapped[layer], formats[2].row_bytes
        gate_bytes, up_bytes, f_bytes = formats[0].row_bytes(width), formats[1].row_bytes(width), of_down(hidden)
        begun = address = self._memory.data_ptr() + slot * self._slot_bytes
        arrived, memory, parts = self._arrived[slot], self._memory, []
        nbytes = sum((e - b) * (gate_bytes + up_bytes) + width * of_down(e - b) for _, b, e in row_ranges)
        with self._recorder.queued("copy", nbytes, weight_copy.stream):
            for expert, begin, end in row_ranges:
                rows = end - begin
                down_bytes = of_down(rows)  # of each of D rows
                to_gate, to_up = address, address + _aligned(rows * gate_bytes)
                to_down = to_up + _aligned(rows * up_bytes)
                copy(to_gate, gate[expert] + begin * gate_bytes, rows * gate_bytes)
                copy(to_up, up[expert] + begin * up_bytes, rows * up_bytes)
                if rows == hidden:
                    copy(to_down, down[expert], width * down_bytes)
                else:
                    copy(to_down, down[expert] + of_down(begin), down_bytes, width, f_bytes)
                addresses = to_gate, to_up, to_down
                parts.append(Part(expert, begin, end, arrived, slot, memory, addresses, width, formats))
                address = to_down + _aligned(width * down_bytes)
        assert address <= begun + room
        weight_copy.arrive(self._arrived[slot])
        return parts

    def done(self, parts: Sequence[Part]) -> None:
        """Free the slot of `parts` when the compute stream has done its work so far: all that reads them."""
        slot = parts[0].slot
        self._free[slot].record()
        self._in_use[slot] = False

    def release(self) -> None:
        """Free all slots, after a step that was broken off: it left parts behind that nobody reads."""
        for slot in range(self.slots):
            if self._in_use[slot]:
                self._free[slot].record()
                self._in_use[slot] = False


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def in_slots(row_ranges: Sequence[RowRange], rows: int) -> Iterator[list[RowRange]]:
    """Hidden rows of experts in order, divided among slots of `rows` rows; only what no slot can hold is cut."""
    slot: list[RowRange] = []
    room = rows
    for expert, begin, end in row_ranges:
        if slot and (end - begin > room or len(slot) == _MOST_PARTS):
            yield slot
            slot, room = [], rows
        while end - begin > rows:
            yield [(expert, begin, begin + rows)]
            begin += rows
        if begin < end:
            slot.append((expert, begin, end))
            room -= end - begin
    if slot:
        yield slot


SLOTS = 3  # of the ring: one is being filled, one is ready, one is read
_SLOT_BYTES = 32 << 20  # of small experts: each copy is some MB, and a kernel's launch is worth its time
_LARGE_EXPERT = 64 << 20  # bytes


def slot_rows(layers: Sequence[ExpertWeights]) -> int:
    """Hidden rows of a slot. A ring holds one large expert; of smaller ones each slot holds one or several.

    So a ring of experts of up to 64 MiB takes at most 192 MiB.
    """
    experts, hidden, _ = layers[0].shape
    expert_bytes = max(weights.expert_bytes for weights in layers)
    if expert_bytes > _LARGE_EXPERT:
        step = max(64, *(weights.split_rows for weights in layers))
        return -(-hidden // (step * SLOTS)) * step
    return hidden * min(-(-_SLOT_BYTES // expert_bytes), -(-experts // SLOTS), _MOST_PARTS)
