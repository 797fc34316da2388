"""Stop strings over a stream, against looking at every beginning of the whole text."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.generation.stop_strings import StopText

PROPERTY = settings(deadline=None, max_examples=300, derandomize=True)
few_letters = st.text("ab", max_size=12)
any_text = st.text(max_size=12)
stop_strings = st.lists(st.one_of(st.text("ab", min_size=1, max_size=5), st.text(min_size=1, max_size=3)), max_size=4)


def naive(text, stops):
    """What the whole text gives, and whether a stop string is in it: the beginnings of `text`, shortest first."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


def pieces(text, cuts):
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(places)]


def run(parts, stops):
    stop = StopText(stops)
    out = [stop.push(part) for part in parts]
    return "".join(out) + stop.finish(), stop.found


@PROPERTY
@given(st.one_of(few_letters, any_text), stop_strings, st.lists(st.integers(0, 99), max_size=12))
def test_any_split_gives_what_the_whole_text_gives(text, stops, cuts):
    assert run(pieces(text, cuts), stops) == naive(text, stops)


@PROPERTY
@given(few_letters, any_text, st.text(min_size=1, max_size=3), st.lists(st.integers(0, 99), max_size=12))
def test_one_stop_string_is_str_find(before, after, stop, cuts):
    text = before + stop + after
    assert run(pieces(text, cuts), [stop]) == (text[: text.find(stop)], True)


@PROPERTY
@given(few_letters, stop_strings)
def test_nothing_is_held_that_cannot_become_a_stop_string(text, stops):
    stop, out = StopText(stops), ""
    for place, letter in enumerate(text, 1):
        out += stop.push(letter)
        if stop.found:
            return
        held = text[:place].removeprefix(out)
        assert out + held == text[:place]
        assert held == "" or any(whole.startswith(held) and whole != held for whole in stops)
        for begin in range(place - len(held)):  # and what was let through begins none
            assert not any(whole.startswith(text[begin:place]) for whole in stops)


@pytest.mark.parametrize(
    "parts, stops, expected, found",
    [
        (["The end", "."], [], "The end.", False),
        (["The ", "end", "."], ["end"], "The ", True),
        (["The e", "n", "d"], ["end"], "The ", True),  # at the very end
        (["The e", "n"], ["end"], "The en", False),  # a beginning only
        (["end"], ["end"], "", True),
        (["aab", "aaab"], ["aaab"], "aab", True),  # begins again inside itself
        (["a", "a", "a", "b"], ["aab"], "a", True),
        (["abab", "abac"], ["abac"], "abab", True),
        (["xabcd"], ["abcd", "c"], "xab", True),  # "c" is complete first, one letter at a time as well
        (["x", "a", "b", "c", "d"], ["abcd", "c"], "xab", True),
        (["xabc"], ["bc", "abc", "c"], "x", True),  # all end together: the longest
        (["one\n", "\nUser", ": two"], ["\n\nUser:", "###"], "one", True),
        (["fid", "dle 🎻", " end"], ["🎻"], "fiddle ", True),
        (["cafe", "\u0301"], ["\u00e9"], "cafe\u0301", False),  # characters are compared as they are
        (["cafe", "\u0301"], ["e\u0301"], "caf", True),
        (["a", "", "b", ""], ["ab"], "", True),
    ],
)
def test_by_hand(parts, stops, expected, found):
    assert run(parts, stops) == (expected, found)


def test_after_a_stop_string_nothing_comes():
    stop = StopText(["."])
    assert stop.push("One. Two") == "One"
    assert stop.found
    assert stop.push(" Three") == ""
    assert stop.finish() == ""


def test_text_comes_as_early_as_it_can():
    stop = StopText(["\nUser:", "\n\n"])
    assert [stop.push(part) for part in ("Hello", "!\n", "U", "ser", "s", "\n", "x")] == [
        "Hello",
        "!",
        "",
        "",
        "\nUsers",
        "",
        "\nx",
    ]
    assert not stop.found
    assert stop.finish() == ""
