"""Where residents go, and the file of counts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, strategies as st

from fiddler.errors import RequestError
from fiddler.placement import place, read_counts


@given(layers=st.integers(1, 40), experts=st.integers(1, 16), room=st.integers(-3, 700))
def test_without_counts_every_layer_gets_its_share(layers, experts, room):
    placed = place(layers, experts, room)
    sizes = [len(row) for row in placed]
    assert sum(sizes) == min(max(room, 0), layers * experts)
    assert max(sizes) - min(sizes) <= 1
    assert all(len(set(row)) == len(row) and set(row) <= set(range(experts)) for row in placed)
    halves = sum(sizes[: layers // 2]), sum(sizes[layers - layers // 2 :])
    assert abs(halves[0] - halves[1]) <= 1


@given(data=st.data(), layers=st.integers(1, 6), experts=st.integers(1, 6))
def test_with_counts_those_chosen_most_often(data, layers, experts):
    counts = [[data.draw(st.integers(0, 9)) for _ in range(experts)] for _ in range(layers)]
    room = data.draw(st.integers(0, layers * experts))
    placed = place(layers, experts, room, counts)
    taken = sorted(counts[layer][e] for layer, row in enumerate(placed) for e in row)
    assert taken == sorted(count for row in counts for count in row)[layers * experts - room :]


def test_equal_counts_spread_over_the_layers():
    assert [len(row) for row in place(4, 8, 12, [[5] * 8] * 4)] == [3, 3, 3, 3]


def test_counts_of_a_file(tmp_path):
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
