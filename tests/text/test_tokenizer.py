"""Ids and text of Mixtral's own model against SentencePiece; features beyond SentencePiece on small vocabularies."""

from __future__ import annotations

import time

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from fiddler.errors import RequestError
from fiddler.text.tokenizer import Tokenizer
from fiddler.text.vocabulary import PREPEND_SCHEME
from oracles.real_tokenizer import REAL, real_metadata
from oracles.texts import REAL_MODEL, texts
from oracles.vocabularies import CONTROL, LETTERS, NORMAL, SPACE, USER, A, B, X, small

ODD = (
    *LETTERS,
    ("▁a", -1, NORMAL),  # 264
    ("<|x|>", 0, CONTROL),  # 265
    ("<u>", 0, USER),  # 266
    ("<u><", 0, USER),  # 267
    ("  b", 0, USER),  # 268
)


ORACLE = sentencepiece.SentencePieceProcessor(model_file=str(REAL_MODEL))


def plain(text):
    """The text that decoding can return: SentencePiece writes a space as U+2581 and cannot tell the two apart."""
    return text.replace("▁", " ")


def streamed(tokenizer, ids, continuing=False):
    decoder = tokenizer.stream(continuing)
    parts = [decoder.push(index) for index in ids]
    return parts, decoder.finish()


# --- Mixtral's own vocabulary -------------------------------------------------------------------------------------


def test_ids_of_many_texts_are_those_of_sentencepiece():
    differing = [text for text in texts() if REAL.encode(text) != ORACLE.encode(text)]
    assert len(texts()) >= 5000
    assert differing == []


def test_decoded_text_is_that_of_sentencepiece_and_round_trips():
    for text in texts():
        ids = REAL.encode(text)
        assert REAL.decode(ids) == ORACLE.decode(ids) == plain(text)
        assert REAL.decode_bytes(ids) == plain(text).encode()
        assert REAL.decode([1, *ids, 2]) == plain(text)


def test_no_id_stands_for_more_bytes_than_the_longest_token():
    """Runs of spaces and of their symbol are the densest texts: 16 of them, of 3 bytes each, are one token."""
    odd = Tokenizer.from_metadata(small(*ODD))
    for text in (*texts(), "▁" * 4800, " " * 4800):
        for tokenizer in (REAL, odd):
            assert len(text.encode()) <= tokenizer.longest_token * len(tokenizer.encode(text))
    assert REAL.longest_token == 48
    assert len(REAL.encode("▁" * 4800, continuing=True)) == 300


def test_streamed_text_is_the_whole_text():
    for text in texts():
        ids = REAL.encode(text)
        parts, rest = streamed(REAL, ids)
        assert "".join(parts) == plain(text)
        assert rest == ""


def test_a_text_that_continues_another_gets_no_space_prefix():
    pieces = REAL.pieces()
    for text in texts()[::5]:
        ids = REAL.encode(text, continuing=True)
        assert b"".join(pieces[index] for index in ids) == plain(text).encode()
        assert REAL.decode(ids, continuing=True) == plain(text)
    assert (pieces[1], REAL.pieces(special=True)[1], pieces[3]) == (b"", b"<s>", b"\0")


def test_prompt_and_continuation_decode_to_the_whole_text():
    for text in texts()[::5]:
        ids = REAL.encode(text)
        for cut in {1, len(ids) // 2, len(ids) - 1} - {0, -1}:
            prompt, continuation = ids[:cut], ids[cut:]
            assert REAL.decode_bytes(prompt) + REAL.decode_bytes(continuation, continuing=True) == plain(text).encode()
            parts, rest = streamed(REAL, continuation, continuing=True)
            assert "".join(parts) + rest == REAL.decode(continuation, continuing=True)


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text):
    ids = REAL.encode(text)
    assert REAL.decode(ids) == plain(text)
    parts, rest = streamed(REAL, ids)
    assert "".join(parts) + rest == plain(text)


@settings(deadline=None)
@given(st.lists(st.one_of(st.text(max_size=6), st.sampled_from(["<s>", "</s>", " ", "▁", "\0"]))).map("".join))
def test_any_text_has_sentencepieces_ids(text):
    assert REAL.encode(text) == ORACLE.encode(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 31999), max_size=30))
def test_any_ids_stream_as_they_decode(ids):
    for continuing in (False, True):
        parts, rest = streamed(REAL, ids, continuing)
        whole = REAL.decode_bytes(ids, continuing)
        assert "".join(parts) + rest == REAL.decode(ids, continuing)
        # Only the beginning of one character is held back, and no half character comes out.
        assert len(rest) <= 3
        assert all(char < "\ud800" or char > "\udfff" for part in parts for char in part)
        if "\ufffd" not in REAL.decode(ids, continuing):
            assert "".join(parts).encode() == whole


@settings(deadline=None)
@given(st.lists(st.integers(3, 31999), max_size=30))
def test_any_ids_decode_as_sentencepiece_decodes(ids):
    assert REAL.decode(ids) == ORACLE.decode(ids)


@settings(deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_round_trip(data):
    ids = REAL.encode(data)
    assert REAL.decode_bytes(ids) == data.replace("▁".encode(), b" ")
    assert REAL.encode(data.decode("utf-8", "surrogateescape")) == ids
    parts, rest = streamed(REAL, ids)
    assert "".join(parts) + rest == REAL.decode(ids)


@pytest.mark.parametrize(
    "data, pieces",
    [
        (b"\xff", ["▁", "<0xFF>"]),
        (b"a\xffb", ["▁a", "<0xFF>", "b"]),
        (b"\xe2\x96", ["▁", "<0xE2>", "<0x96>"]),  # two thirds of a character
        (b"\xed\xa0\x80 a", ["▁", "<0xED>", "<0xA0>", "<0x80>", "▁a"]),  # a surrogate is no character
        (b"\xc0\x80", ["▁", "<0xC0>", "<0x80>"]),  # nor is an overlong one
        (b"\xf0\x9f\x98\x80\x80", ["▁", "😀", "<0x80>"]),
        (b"\xc3\xa9\xc3", ["▁é", "<0xC3>"]),
    ],
)
def test_invalid_utf8_becomes_byte_tokens(data, pieces):
    ids = REAL.encode(data)
    assert [REAL.token(index) for index in ids] == pieces
    assert REAL.decode_bytes(ids) == data
    assert REAL.decode(ids).count("\ufffd") == len(data) - len(data.decode("utf-8", "ignore").encode())


def test_escaped_bytes_that_make_a_character_are_that_character():
    assert REAL.encode("\udcc3\udca9") == REAL.encode("é")


def test_a_surrogate_that_is_no_byte_becomes_the_replacement_character():
    assert REAL.encode("a\ud83d\udc00b") == REAL.encode("a\ufffd\ufffdb")


@pytest.mark.parametrize("text", ["<s>", "</s>", "<unk>", " <s> a</s>", "<s></s>", "<0x0A>", "a<s>"])
def test_the_name_of_a_control_token_in_a_text_stays_text(text):
    ids = REAL.encode(text)
    assert all(REAL.decode([index]) or REAL.token(index) == "▁" for index in ids)
    assert not {0, 1, 2, 13} & set(ids)
    assert REAL.decode(ids) == text


def test_special_tokens_are_recognised_on_request():
    assert REAL.encode("<s>a</s>", parse_special=True) == [1, *REAL.encode("a"), 2]
    assert REAL.encode("<s>", add_bos=True) == [1, *REAL.encode("<s>")]
    assert REAL.encode("", add_bos=True) == [1]
    assert REAL.encode("") == []
    assert REAL.decode([]) == REAL.decode([1]) == ""


def test_mixtrals_tokenizer_has_its_known_properties():
    assert (REAL.vocab_size, REAL.bos_id, REAL.eos_id, REAL.end_ids) == (32000, 1, 2, frozenset({2}))
    assert (REAL.add_bos, REAL.add_eos, REAL.chat_template) == (True, False, None)
    assert (REAL.token(1), REAL.token(13)) == ("<s>", "<0x0A>")


def test_loading_mixtrals_vocabulary_takes_less_than_a_second():
    keys, seconds = real_metadata(), []
    for _ in range(3):
        start = time.process_time()
        Tokenizer.from_metadata(keys)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0  # 0.09 s on an idle machine; quadratic time would take minutes


@pytest.mark.parametrize("index", [-1, 32000, 1 << 70])
def test_ids_outside_the_vocabulary_are_refused(index):
    for use in (REAL.token, REAL.stream().push, lambda one: REAL.decode([5, one])):
        with pytest.raises(RequestError, match="outside the vocabulary of 32000"):
            use(index)


# --- special tokens, prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, special, ids",
    [
        ("a", False, [264]),
        ("<u>", False, [266]),  # no prefix where there is no text
        ("a<u>a", False, [264, 266, 264]),  # a prefix after a special token, too
        ("a<u> a", False, [264, 266, SPACE, 264]),
        ("<u><u>", False, [267, SPACE, *(3 + ord(char) for char in "u>")]),  # the longest first, and then no "<u>"
        ("a  b", False, [264, 268]),
        ("  b", False, [268]),
        ("<|x|>", False, [SPACE, *(3 + ord(char) for char in "<|"), X, *(3 + ord(char) for char in "|>")]),
        ("<|x|>", True, [265]),
        ("a<|x|><s>a", True, [264, 265, 1, 264]),
        ("<unk>", True, [0]),
    ],
)
def test_special_tokens_in_a_text_get_their_ids_and_the_text_around_them_its_prefixes(text, special, ids):
    tokenizer = Tokenizer.from_metadata(small(*ODD))
    assert tokenizer.encode(text, parse_special=special) == ids


def test_user_defined_tokens_decode_to_their_exact_text():
    tokenizer = Tokenizer.from_metadata(small(*ODD))
    assert tokenizer.decode([268]) == "  b"
    assert tokenizer.decode([266, 265, 267]) == "<u><u><"
    assert tokenizer.decode(tokenizer.encode("a  b<u>")) == "a  b<u>"


def test_without_a_space_prefix_ids_and_text_have_no_added_space():
    tokenizer = Tokenizer.from_metadata(small(*ODD, add_space_prefix=False))
    assert tokenizer.encode("ab a<u>a") == [A, B, 264, 266, A]
    assert tokenizer.decode([264, B]) == " ab"


@pytest.mark.parametrize(
    "scheme, text, ids",
    [
        ("always", " a", [264]),
        ("always", "▁a", [264]),
        ("always", "  a", [SPACE, 264]),
        ("always", "a<u>a<u> a", [264, 266, 264, 266, 264]),
        ("first", "a<u>a<u> a", [264, 266, A, 266, 264]),
        ("first", "<u>a", [266, A]),
        ("first", " a", [264]),
    ],
)
def test_space_prefixes_follow_the_prepend_scheme_of_metaspace(scheme, text, ids):
    tokenizer = Tokenizer.from_metadata(small(*ODD) | {PREPEND_SCHEME: scheme})
    assert tokenizer.encode(text) == ids


@settings(deadline=None)
@given(st.text("ab <u|x>\n", max_size=20), st.booleans())
def test_ids_hold_the_whole_text_with_and_without_special_tokens(text, special):
    tokenizer = Tokenizer.from_metadata(small(*ODD, add_space_prefix=False))
    ids = tokenizer.encode(text, parse_special=special)
    assert "".join({265: "<|x|>"}.get(index) or tokenizer.decode([index]) for index in ids) == text
