"""An answer cut into pieces in many ways, and what a parser makes of the pieces."""

from __future__ import annotations

import random

__all__ = ["cuts", "parts"]


def parts(parser, pieces):
    """What an answer in pieces has: reasoning, content, and (name, arguments) of each call."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)] + parser.finish()
    reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning")
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    names = [delta.text for delta in deltas if delta.kind == "call"]
    calls = ["".join(d.text for d in deltas if d.kind == "arguments" and d.index == i) for i in range(len(names))]
    assert all(delta.text for delta in deltas)
    assert [delta.index for delta in deltas if delta.kind == "call"] == list(range(len(names)))
    return reasoning, content, list(zip(names, calls, strict=True))


def cuts(text):
    """The text whole, letter by letter, and cut at random."""
    yield [text]
    yield list(text)
    chance = random.Random(text)
    for _ in range(20):
        at = sorted(chance.sample(range(len(text) + 1), min(4, len(text))))
        yield [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]
