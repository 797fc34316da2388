"""Stop strings in a beam's text, a token at a time, against the whole text decoded at once."""

from __future__ import annotations

import random

import pytest

import fiddler
from fiddler.generation.beam_text import BeamTexts
from fiddler.generation.stop_strings import StopText

STOPS = ("ab", "é", "日本", "\ufffd\ufffd", "a\ufffd", "😀b")


@pytest.fixture(scope="module")
def tokenizer():
    return fiddler.load(device="cpu", threads=1).tokenizer


def tokens_of(tokenizer, draw):
    """Random tokens: letters, bytes of characters of several, whole or cut short, and tokens without text."""
    byte = {tokenizer.token(token): token for token in range(tokenizer.vocab_size)}
    parts = [tokenizer.encode("a", continuing=True), tokenizer.encode("b", continuing=True), [tokenizer.bos_id]]
    for character in "é日本😀":
        ids = [byte[f"<0x{each:02X}>"] for each in character.encode()]
        parts += [ids, ids[:-1], ids[1:]]
    return [token for _ in range(12) for token in draw.choice(parts)]


def test_a_beam_stops_where_its_whole_text_does(tokenizer):
    draw, stopped = random.Random(3), 0
    for _ in range(1000):
        stops = draw.sample(STOPS, 2)
        texts, tokens = BeamTexts(tokenizer, stops), tokens_of(tokenizer, draw)
        state, stream, whole = texts.start, tokenizer.stream(continuing=True), StopText(stops)
        for token in tokens:
            state = texts.extended(state, token)
            whole.push(stream.push(token))
            assert state.stopped == whole.found
            if whole.found:
                stopped += 1
                break
            assert len(state.pending) <= 4
    assert 200 < stopped < 990


def test_a_state_is_shared_by_the_beams_that_continue_it(tokenizer):
    texts = BeamTexts(tokenizer, ["ab"])
    letters = {letter: tokenizer.encode(letter, continuing=True)[0] for letter in "abc"}
    parent = texts.extended(texts.start, letters["a"])
    assert not texts.extended(parent, letters["c"]).stopped
    assert texts.extended(parent, letters["b"]).stopped
    assert not texts.extended(parent, letters["a"]).stopped


def test_without_stop_strings_no_token_is_decoded(tokenizer):
    texts = BeamTexts(tokenizer, ())
    assert texts.extended(texts.start, 300) is texts.start
