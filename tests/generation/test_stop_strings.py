"""Stop strings in a stream, against an oracle that tries every prefix of the whole text."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.generation.stop_strings import StopText

PROPERTY = settings(deadline=None, max_examples=300, derandomize=True)
few_letters = st.text("ab", max_size=12)
any_text = st.text(max_size=12)
stop_strings = st.lists(st.one_of(st.text("ab", min_size=1, max_size=5), st.text(min_size=1, max_size=3)), max_size=4)


def naive(text, stops):
    """The text before the first stop string, and whether there is one: tries every prefix, shortest first."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


def pieces(text, cuts):
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[begin:end] for begin, end in pairwise(bounds)]


def run(parts, stops):
    stop = StopText(stops)
    out = [stop.push(part) for part in parts]
    return "".join(out) + stop.finish(), stop.found


@PROPERTY
@given(st.one_of(few_letters, any_text), stop_strings, st.lists(st.integers(0, 99), max_size=12))
def test_any_split_of_a_text_gives_what_the_whole_text_gives(text, stops, cuts):
    assert run(pieces(text, cuts), stops) == naive(text, stops)


@PROPERTY
@given(few_letters, any_text, st.text(min_size=1, max_size=3), st.lists(st.integers(0, 99), max_size=12))
def test_one_stop_string_cuts_where_str_find_finds_it(before, after, stop, cuts):
    text = before + stop + after
    assert run(pieces(text, cuts), [stop]) == (text[: text.find(stop)], True)


@PROPERTY
@given(few_letters, stop_strings)
def test_only_the_beginning_of_a_stop_string_is_held_back(text, stops):
    stop, out = StopText(stops), ""
    for end, letter in enumerate(text, 1):
        out += stop.push(letter)
        if stop.found:
            return
        held = text[:end].removeprefix(out)
        assert out + held == text[:end]
        assert held == "" or any(whole.startswith(held) and whole != held for whole in stops)
        for begin in range(end - len(held)):  # and no released text begins one
            assert not any(whole.startswith(text[begin:end]) for whole in stops)


@pytest.mark.parametrize(
    "parts, stops, expected, found",
    [
        (["The end", "."], [], "The end.", False),
        (["The ", "end", "."], ["end"], "The ", True),
        (["The e", "n", "d"], ["end"], "The ", True),  # at the very end
        (["The e", "n"], ["end"], "The en", False),  # only the beginning of one
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
def test_stop_strings_by_hand(parts, stops, expected, found):
    assert run(parts, stops) == (expected, found)


def test_after_a_stop_string_no_text_comes():
    stop = StopText(["."])
    assert stop.push("One. Two") == "One"
    assert stop.found
    assert stop.push(" Three") == ""
    assert stop.finish() == ""


def test_text_that_begins_no_stop_string_comes_at_once():
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


@pytest.mark.parametrize("end", ["c", "b"])
def test_a_long_stop_string_takes_time_linear_in_the_text(end):
    """A million letters that are held back, and then let go at once; trying every overlap takes minutes."""
    n = 1_000_000
    began = time.process_time()
    text, found = run((["a" * 40] * (n // 40) + [end]) * 2, ["a" * n + "b"])
    assert time.process_time() - began < 10  # [s]; 1 on a quiet machine
    assert (len(text), found) == ((0, True) if end == "b" else (2 * n + 2, False))
