"""A fuzzer's bytes as a row of choices: the same bytes make the same choices again, with no fuzzer there."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["INTERESTING", "KINDS", "Draw", "changed_json", "each_value_changed", "words"]

T = TypeVar("T")

INTERESTING: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 31, 32, 33, 255, 256, 65536, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**63),
    *(2**64, 10**40, -(2**63), 0.0, -0.0, 0.5, 1e-46, 1e-38, 1e38, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", " ", "a", "none", "auto", "\0", "\n", "\x1b[31m", "é", "🦦", "\ud800", "../x", "a" * 300, "▁" * 9),
    *([], [[]], {}, {"a": {}}, [0], [None], [1, 2, 3], ["a", "b"], [{"type": "text", "text": "a"}]),
)
"""JSON values at which code may stumble."""
KINDS: tuple[object, ...] = (None, True, -1, 1.5, 10**400, float("inf"), "a", "\ud800", [], [[]], {}, {"a": {}})
"""One JSON value of each kind that code may take for another."""


class Draw:
    """Chooses by `data`; where it ends, the first of everything."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """A number from 0 to count - 1."""
        size = 1 if count <= 1 << 8 else 2 if count <= 1 << 16 else 8
        return int.from_bytes(self.take(size), "little") % count

    def choice(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        part = self._data[self._at : self._at + count]
        self._at += len(part)
        return part

    def value(self) -> object:
        """A JSON value."""
        kind = self.below(8)
        if kind == 0:
            return struct.unpack("<q", self.take(8).ljust(8, b"\0"))[0]
        if kind == 1:
            return struct.unpack("<d", self.take(8).ljust(8, b"\0"))[0]
        if kind == 2:
            return self.take(self.below(24)).decode("utf-8", "surrogateescape")
        return deepcopy(self.choice(INTERESTING))


def changed_json(draw: Draw, root: dict[str, object], keys: Sequence[str] = ()) -> dict[str, object]:
    """A JSON object with one to four changes, each anywhere in it. keys: that some object may have besides."""
    for _ in range(1 + draw.below(4)):
        places = [(root, key) for key in root]
        containers: list[dict[str, object] | list[object]] = [root]
        for parent, key in places:  # grows meanwhile: all places, the outer ones first
            child = parent[key]  # type: ignore[index]
            if isinstance(child, dict | list) and len(places) < 5000:
                containers.append(child)
                places += [(child, k) for k in (child if isinstance(child, dict) else range(len(child)))]  # type: ignore[misc]
        kind = draw.below(6)
        if kind == 0 or not places:  # one more
            container = draw.choice(containers)
            if isinstance(container, dict):
                container[draw.choice([*keys, "a", ""])] = draw.value()
            else:
                container.insert(draw.below(len(container) + 1), draw.value())
            continue
        parent, key = draw.choice(places)
        if kind == 1:  # one less
            del parent[key]
        elif kind == 2:  # another one of it
            other, other_key = draw.choice(places)
            parent[key] = deepcopy(other[other_key])
        else:
            parent[key] = draw.value()
    return root


def each_value_changed(root: Any, kinds: Sequence[object] = KINDS) -> Iterator[tuple[str, Any]]:
    """Every document with one value of `root` replaced by one of `kinds`, or left out; and which. Of lists and objects
    of more than 80 values the first two and the last."""
    for number, (_, key) in enumerate(_places(root)):
        for value in (*kinds, ...):
            changed = deepcopy(root)
            parent, _ = _places(changed)[number]
            if value is ...:
                del parent[key]
            else:
                parent[key] = deepcopy(value)
            yield f"{key} -> {'left out' if value is ... else repr(value)[:20]}", changed


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    places = []
    for key in keys if len(keys) <= 80 else (*keys[:2], keys[-1]):
        places.append((node, key))
        if isinstance(node[key], dict | list):
            places += _places(node[key])
    return places


def words(name: str) -> tuple[str, ...]:
    """The lines of a list in `words/`: keys or pieces of a language."""
    return tuple((Path(__file__).parent / "words" / f"{name}.txt").read_text().splitlines())
