"""Which experts are resident, the file of expert counts, and the layout of GPU memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from fiddler.errors import RequestError
from fiddler.gpu.memory_layout import Sizes, first_blocks, lay_out, least_room
from fiddler.offload.residency import place, within
from fiddler.telemetry.expert_counts import read_counts


@given(layers=st.integers(1, 40), experts=st.integers(1, 16), room=st.integers(-3, 700))
def test_without_counts_residents_spread_evenly_over_the_layers(layers, experts, room):
    placed = place(layers, experts, room)
    sizes = [len(row) for row in placed]
    assert sum(sizes) == min(max(room, 0), layers * experts)
    assert max(sizes) - min(sizes) <= 1
    assert all(len(set(row)) == len(row) and set(row) <= set(range(experts)) for row in placed)
    halves = sum(sizes[: layers // 2]), sum(sizes[layers - layers // 2 :])
    assert abs(halves[0] - halves[1]) <= 1


@given(data=st.data(), layers=st.integers(1, 6), experts=st.integers(1, 6))
def test_with_counts_the_experts_chosen_most_often_are_resident(data, layers, experts):
    counts = [[data.draw(st.integers(0, 9)) for _ in range(experts)] for _ in range(layers)]
    room = data.draw(st.integers(0, layers * experts))
    placed = place(layers, experts, room, counts)
    resident_counts = sorted(counts[layer][e] for layer, row in enumerate(placed) for e in row)
    assert resident_counts == sorted(count for row in counts for count in row)[layers * experts - room :]


def test_with_equal_counts_residents_spread_over_the_layers():
    assert [len(row) for row in place(4, 8, 12, [[5] * 8] * 4)] == [3, 3, 3, 3]


def test_expert_counts_are_read_from_a_file_and_bad_files_refused(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"counts": [[1, 2], [3, 4], [0, 9]]}))
    assert read_counts(path, 3, 2) == [[1, 2], [3, 4], [0, 9]]
    with pytest.raises(RequestError, match="2 layers with 2 experts"):
        read_counts(path, 2, 2)
    for text in ("", "[]", "{}", '{"counts": 3}', '{"counts": [[1, -2], [3, 4], [0, 9]]}', "[" * 100000):
        path.write_text(text)
        with pytest.raises(RequestError, match=r"counts\.json"):
            read_counts(path, 3, 2)
    with pytest.raises(RequestError, match="cannot be read"):
        read_counts(tmp_path / "none", 3, 2)


def needed(sizes, layout):
    """Bytes of a layout, summed up independently."""
    return (
        sizes.fixed
        + layout.chunk * sizes.token
        + layout.residents * sizes.expert
        + (sizes.slots if layout.slots else 0)
    )


@given(
    room=st.integers(0, 10**6),
    sizes=st.builds(
        Sizes,
        fixed=st.integers(0, 10**5),
        token=st.integers(1, 300),
        slots=st.integers(1, 10**5),
        expert=st.integers(1, 10**5),
        experts=st.integers(1, 64),
        context=st.integers(1, 9000),
    ),
    max_residents=st.integers(0, 70),
)
def test_a_memory_layout_fits_and_has_no_room_for_another_expert(room, sizes, max_residents):
    layout = lay_out(room, sizes, max_residents)
    if layout is None:
        # `least_room` holds where all experts are allowed; staging slots are needed where some are not
        assert room < least_room(sizes) or max_residents < sizes.experts
        return
    assert needed(sizes, layout) <= room
    assert layout.chunk <= sizes.context
    assert layout.residents == sizes.experts or layout.slots
    assert layout.residents <= min(max_residents, sizes.experts)
    if layout.residents < min(max_residents, sizes.experts):
        assert needed(sizes, layout) + sizes.expert > room
    if max_residents >= sizes.experts and layout.slots:  # they do not fit even with the shortest steps
        assert sizes.fixed + min(128, sizes.context) * sizes.token + sizes.experts * sizes.expert > room


@given(
    fixed=st.integers(0, 10**5),
    token=st.integers(1, 300),
    slots=st.integers(1, 10**5),
    expert=st.integers(1, 10**5),
    context=st.integers(1, 9000),
)
def test_the_least_room_has_a_layout_and_one_byte_less_has_none(fixed, token, slots, expert, context):
    sizes = Sizes(fixed, token, slots, expert, 8, context)
    assert lay_out(least_room(sizes), sizes, 8) is not None
    assert lay_out(least_room(sizes) - 1, sizes, 8) is None


def test_mixtral_8x7b_on_24_gib_has_steps_of_4096_tokens_and_50_to_60_residents():
    """Steps of 4096 tokens take 1 GB; some 55 of the 256 experts fit."""
    sizes = Sizes(fixed=3_900 << 20, token=4096 * 60, slots=354 << 20, expert=336 << 20, experts=256, context=4096)
    layout = lay_out((24 << 30) - (900 << 20), sizes, 256)
    assert (layout.chunk, layout.slots) == (4096, True)
    assert 50 <= layout.residents <= 60
    assert lay_out(100 << 30, sizes, 256).residents == 256
    assert not lay_out(100 << 30, sizes, 256).slots


@given(
    room=st.integers(0, 10**6),
    sizes=st.builds(
        Sizes,
        fixed=st.integers(0, 10**4),
        token=st.integers(1, 30),
        slots=st.integers(1, 10**4),
        expert=st.integers(1, 10**4),
        experts=st.sampled_from([8, 16, 64]),
        context=st.integers(128, 9000),
    ),
    max_residents=st.integers(0, 70),
    whole=st.integers(1, 100),
    block=st.integers(1, 10**4),
)
def test_residents_can_give_back_what_keys_and_values_of_the_whole_context_need_later(
    room, sizes, max_residents, whole, block
):
    least, segment, layers = min(whole, 10), 5000, 8
    begin = first_blocks(room, sizes, max_residents, (least, whole), block, segment, layers)
    of_whole = lay_out(room, replace(sizes, fixed=sizes.fixed + whole * block), max_residents)
    if not begin.later:
        assert begin.blocks == whole
        return
    assert begin.blocks == least
    left = room - begin.blocks * block
    layout = lay_out(left, replace(sizes, fixed=sizes.fixed + begin.spare), begin.max_residents)
    assert layout.slots
    assert layout.residents >= of_whole.residents
    assert layout.residents <= sizes.experts - layers  # no layer is complete
    step = sizes.token * min(layout.chunk, begin.chunk)
    unused = left - sizes.fixed - sizes.slots - step - layout.residents * sizes.expert
    assert unused + layout.residents * sizes.expert >= begin.later + segment  # segments are no longer


@pytest.mark.parametrize("room, first", [(20 << 30, 129), (26 << 30, 129), (29 << 30, 1025), (80 << 30, 1025)])
def test_a_model_that_nearly_fits_has_memory_for_the_whole_context_from_the_start(room, first):
    """32 layers of 8 experts of 100 MB: residents that complete layers could not give their memory back."""
    sizes = Sizes(fixed=128 << 20, token=4096 * 60, slots=105 << 20, expert=100_000_000, experts=256, context=32768)
    begin = first_blocks(room, sizes, 256, (129, 1025), 4 << 20, 64 << 20, 32)
    assert begin.blocks == first
    assert begin.max_residents == (256 if first == 1025 else 224)


def test_experts_of_different_sizes_stay_within_the_bytes():
    """Those of least value go: without counts the last one of the layer with the most, with counts the rarest."""
    placed, sizes = [[0, 1, 2], [0, 1], []], [10, 7, 9]
    assert within(placed, sizes, 44) == placed
    assert within(placed, sizes, 43) == [[0, 1], [0, 1], []]
    assert within(placed, sizes, 33) == [[0], [0, 1], []]
    assert within(placed, sizes, 0) == [[], [], []]
    counts = [[1, 9, 9], [0, 5, 0], [0, 0, 0]]
    assert within(placed, sizes, 43, counts) == [[0, 1, 2], [1], []]
    assert within(placed, sizes, 36, counts) == [[1, 2], [1], []]
