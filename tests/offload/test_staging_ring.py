"""The staging ring: which rows lie in which slot, and that they are those of the mapping."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fiddler.device.weight_copy import HostCopy
from fiddler.files.weights import ExpertWeights
from fiddler.kernels import ExpertMatrices
from fiddler.offload.staging_ring import SLOTS, Ring, in_slots, slot_rows
from oracles.both_sides import EXACT, F, weights_of


@pytest.mark.parametrize("layers", [EXACT, weights_of("bf16", "f32", apart=True)], ids=["stacks", "apart"])
def test_the_staging_ring_delivers_the_rows_of_the_mapping_in_order(layers):
    ring = Ring(HostCopy(), layers, 64, 3)
    w = layers[1]
    for begin, end in ((0, F), (64, 250), (F - 64, F)):
        row = begin
        for (part,) in ring.send(1, [(2, begin, end)]):
            assert (part.begin, part.end) == (row, min(row + 64, end))
            row = part.end
            holds_the_mapping(part, w)
            ring.done([part])
        assert row == end
    for _ in range(3):
        next(ring.send(0, [(0, 0, 64)]))
    with pytest.raises(AssertionError, match="before its parts were done"):
        next(ring.send(0, [(0, 0, 64)]))
    ring.release()
    ring.done(next(ring.send(0, [(0, 0, 64)])))


def holds_the_mapping(part, w):
    rows = slice(part.begin, part.end)
    expected = w.gate[part.expert][rows], w.up[part.expert][rows], w.down[part.expert][:, rows]
    for matrix, bits in zip(part.matrices(), expected, strict=True):
        assert matrix.data_ptr() % 16 == 0
        np.testing.assert_array_equal(matrix.view(torch.uint16).numpy(), bits)


def test_a_slot_of_the_staging_ring_holds_several_small_experts():
    ring, w = Ring(HostCopy(), EXACT, 2 * F, 2), EXACT[2]
    wanted = [(0, 0, F), (1, 64, F), (2, 0, 128), (3, 0, F), (4, 0, F)]
    slots = list(ring.send(2, wanted[:4]))
    assert [[part.expert for part in parts] for parts in slots] == [[0, 1], [2, 3]]
    for part in (part for parts in slots for part in parts):
        holds_the_mapping(part, w)
    for parts in slots:
        ring.done(parts)


class Held(HostCopy):
    """Notes which events later copies wait for, and how often each was recorded by then."""

    def __init__(self):
        super().__init__()
        self.events, self.held = [], []

    def event(self):
        self.events.append(SimpleNamespace(records=0))
        event = self.events[-1]
        event.record = lambda: setattr(event, "records", event.records + 1)
        return event

    def hold(self, event):
        self.held.append((self.events.index(event), event.records))


def test_a_token_s_copies_and_a_prompt_s_wait_for_each_other_s_readers():
    copy = Held()
    ring = Ring(copy, EXACT, F, 2)  # events: two of slots that arrive, two of free ones, the token's
    ring.done(next(ring.send(0, [(0, 0, F)])))
    assert copy.held == [(2, 0)]
    ring.begin_token()
    ring.begin_token()  # of the next token: its copies are ordered by what they wait for
    assert copy.held[1:] == [(2, 1), (3, 0)]
    parts = next(ring.send(1, [(1, 0, F)]))
    assert copy.held[3:] == [(4, 1), (3, 0)]
    with pytest.raises(AssertionError):
        ring.begin_token()  # a prompt's parts are in use
    ring.done(parts)
    ring.done(next(ring.send(1, [(1, 0, F)])))
    assert copy.held[5:] == [(2, 1)]  # once
    ring.begin_token()
    assert copy.held[6:] == [(2, 2), (3, 1)]


@given(
    ranges=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50), st.integers(0, 50)), max_size=80),
    rows=st.integers(1, 60),
)
def test_slots_hold_every_row_once_and_only_cut_an_expert_that_fits_none(ranges, rows):
    ranges = [(e, begin, begin + count) for e, begin, count in ranges]
    slots = list(in_slots(ranges, rows))
    assert all(0 < sum(end - begin for _, begin, end in slot) <= rows for slot in slots)
    assert max(map(len, slots), default=0) <= 32
    of_each = [part for slot in slots for part in slot]
    for e, begin, end in ranges:
        row = begin
        while row < end:
            assert of_each[0][:2] == (e, row)
            row = of_each.pop(0)[2]
            assert row in (end, begin + rows) or end - begin > rows
    assert not of_each


@pytest.mark.parametrize(
    "shape,slot,ring_bytes",
    [
        ((8, 14336, 4096), 4800, 354e6),  # Mixtral-8x7B: a third of an expert
        ((128, 768, 2048), 4 * 768, 113e6),  # Qwen3-30B-A3B: four experts
        ((128, 1408, 4096), 1408, 104e6),  # GLM-4.5-Air: one
        ((256, 2048, 7168), 704, 91e6),  # DeepSeek-V3: a third
        ((32, 256, 256), 11 * 256, 13e6),  # no more than a layer has
        ((512, 64, 64), 32 * 64, 2.36e6),
    ],
)
def test_slots_of_small_experts_are_some_megabytes_and_the_ring_stays_small(shape, slot, ring_bytes):
    nowhere, (experts, hidden, width) = np.zeros(shape[0], np.int64), shape
    up, down = (ExpertMatrices((), nowhere, each, np.dtype(np.uint16)) for each in (shape, (experts, width, hidden)))
    w = ExpertWeights(up, up, down, EXACT[0].variant)
    assert slot_rows([w]) == slot
    assert Ring.nbytes([w], slot, SLOTS) == pytest.approx(ring_bytes, rel=0.01)
