"""Copies are cut where one pinned part of a mapping ends and the next one begins."""

from __future__ import annotations

from hypothesis import given, strategies as st

from fiddler.device.weight_copy import within


@given(st.data())
def test_the_parts_of_a_copy_cover_it_once_and_cross_no_border(data):
    width, rows = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    pitch = data.draw(st.sampled_from([width, width + 1, width + 13])) if rows > 1 else data.draw(st.integers(0, 30))
    source = data.draw(st.integers(0, 40))
    borders = sorted(data.draw(st.sets(st.integers(0, 300), max_size=12)))
    expected = [source + row * pitch + column for row in range(rows) for column in range(width)]
    source_of = {}
    for begin, count, size, to in within(source, width, rows, pitch, borders):
        assert count > 0
        assert size > 0
        last = begin + (count - 1) * pitch + size
        assert not any(begin < border < last for border in borders)
        for row in range(count):
            for column in range(size):
                assert to + row * size + column not in source_of
                source_of[to + row * size + column] = begin + row * pitch + column
    assert [source_of[target] for target in sorted(source_of)] == expected
    assert sorted(source_of) == list(range(len(expected)))


def test_a_copy_that_crosses_no_border_has_one_part():
    assert list(within(1000, 10, 4, 30, [0, 500, 5000])) == [(1000, 4, 10, 0)]
    assert list(within(1000, 10, 4, 10, [0, 1000, 1040])) == [(1000, 1, 40, 0)]
