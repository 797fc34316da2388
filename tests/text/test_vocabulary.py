"""Tokenizer metadata that is missing, odd or broken: the defaults, the odd vocabularies and the errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fiddler.errors import FileFormatError
from fiddler.text.tokenizer import Tokenizer
from fiddler.text.vocabulary import IN_TEXT_IDS, PREPEND_SCHEME
from oracles.vocabularies import BYTE, CONTROL, LETTERS, NORMAL, SPACE, UNUSED, USER, A, metadata, small


def test_defaults_are_llama_cpps():
    tokenizer = Tokenizer.from_metadata(small(*LETTERS))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (1, 2, True, False)
    assert tokenizer.encode("a") == [SPACE, A]


def test_metadata_keys_override_the_defaults():
    keys = small(
        *LETTERS,
        ("▁a", -1, NORMAL),
        ("<|x|>", 0, CONTROL),
        bos_token_id=265,
        eos_token_id=1,
        add_bos_token=False,
        add_eos_token=True,
    )
    tokenizer = Tokenizer.from_metadata(keys | {"tokenizer.chat_template": "{{ x }}"})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (265, 1, False, True)
    assert tokenizer.chat_template == "{{ x }}"
    assert tokenizer.encode("a", add_bos=True) == [265, 264]


def test_end_tokens_are_found_by_key_and_by_name():
    keys = small(*LETTERS, ("<|im_end|>", 0, USER), ("<|eot_id|>", 0, NORMAL), ("x", 0, CONTROL), eot_token_id=266)
    tokenizer = Tokenizer.from_metadata(keys)
    assert tokenizer.end_ids == {2, 264, 265, 266}
    assert not tokenizer.end_ids & set(
        tokenizer.encode("<|im_end|><|eot_id|>")
    )  # control tokens, whatever the file says
    assert tokenizer.encode("<|im_end|>", parse_special=True) == [264]


def test_duplicate_empty_and_non_utf_8_tokens_encode_and_decode():
    odd = (
        *LETTERS,
        ("ab", -1, NORMAL),  # 264: the same text again at 265, whose id is used
        ("ab", -1, NORMAL),
        ("", -1, NORMAL),
        ("\udcff", -1, NORMAL),
        ("a\0", -1, NORMAL),
        ("<s>", -1, NORMAL),  # 269: an ordinary token, which a text may contain, unlike 1
        ("ab", -1, UNUSED),
        ("<0x41>", 0, BYTE),  # 271: once more
        ("c", -1, 0),
    )
    tokenizer = Tokenizer.from_metadata(small(*odd, add_space_prefix=False))
    assert tokenizer.encode("ab") == [265]
    assert [tokenizer.decode_bytes([index]) for index in range(264, 273)] == [
        *(b"ab", b"ab", b"", b"\xff", b"a\0", b"<s>", b"", b"A", b""),
    ]
    assert tokenizer.encode("a\0A") == [A, 3, 3 + 0x41]
    assert tokenizer.decode_bytes(tokenizer.encode(b"\xffab\0c")) == b"\xffab\0c"


def test_a_vocabulary_of_byte_tokens_alone_encodes_text():
    pieces = [(f"<0x{byte:02X}>", 0, BYTE) for byte in range(256)]
    tokenizer = Tokenizer.from_metadata(metadata(pieces, add_bos_token=True))
    assert tokenizer.encode("é") == [0xE2, 0x96, 0x81, 0xC3, 0xA9]
    with pytest.raises(FileFormatError, match="bos_token_id is 256"):
        Tokenizer.from_metadata(metadata(pieces, bos_token_id=256))


BROKEN = {
    "another model": ({"model": "bert"}, "only 'llama'"),
    "no model": ({"model": None}, "is None"),
    "no tokens": ({"tokens": None}, "tokens is None"),
    "empty tokens": ({"tokens": []}, "at least one string"),
    "a token that is no string": ({"tokens": [b"a"]}, "for token 0"),
    "an endless token": ({"tokens": ["a" * 70000]}, "70000 characters"),
    "no scores": ({"scores": None}, "scores is None"),
    "few scores": ({"scores": np.zeros(3, np.float32)}, "3 entries for 264 tokens"),
    "scores in a list": ({"scores": [0.0] * 264}, "scores is a list"),
    "scores in a square": ({"scores": np.zeros((264, 1), np.float32)}, "must be an array"),
    "a score that is none": ({"scores": np.full(264, np.nan, np.float32)}, "nan for token 0"),
    "an infinite score": ({"scores": np.full(264, np.inf, np.float32)}, "inf for token 0"),
    "no types": ({"token_type": None}, "token_type is None"),
    "types of real numbers": ({"token_type": np.zeros(264, np.float32)}, "must be an array"),
    "an unknown type": ({"token_type": np.full(264, 7, np.int32)}, "7 for token 0"),
    "a negative type": ({"token_type": np.full(264, -1, np.int32)}, "-1 for token 0"),
    "no bytes": ({"token_type": np.full(264, 1, np.int32)}, "lacks 256 of the 256 byte tokens"),
    "a byte token of another name": ({"token_type": np.full(264, 6, np.int32)}, "called '<unk>'"),
    "bos out of range": ({"bos_token_id": 264}, "bos_token_id is 264"),
    "a negative eos": ({"eos_token_id": -1}, "eos_token_id is -1"),
    "eos that is true": ({"eos_token_id": True}, "eos_token_id is True"),
    "eot of text": ({"eot_token_id": "</s>"}, "eot_token_id is '</s>'"),
    "a flag of text": ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
    "a flag that is one": ({"add_space_prefix": 1}, "must be true or false"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_broken_metadata_is_refused_in_one_line_that_names_it(change, message):
    with pytest.raises(FileFormatError, match=message) as raised:
        Tokenizer.from_metadata(small(*LETTERS, **change))
    assert "\n" not in str(raised.value)


BROKEN_KEYS = [
    ("tokenizer.chat_template", 5),
    (PREPEND_SCHEME, "never"),
    (PREPEND_SCHEME, 1),
    (IN_TEXT_IDS, 5),
    (IN_TEXT_IDS, np.array([259], np.int32)),  # an ordinary token
    (IN_TEXT_IDS, np.array([-1], np.int32)),
    (IN_TEXT_IDS, np.array([1e9], np.float32)),
]


@pytest.mark.parametrize("key, value", BROKEN_KEYS)
def test_a_broken_key_of_the_chat_template_or_of_spaces_is_refused_by_its_name(key, value):
    with pytest.raises(FileFormatError, match=key):
        Tokenizer.from_metadata(small(*LETTERS) | {key: value})


@settings(deadline=None)
@given(st.data())
def test_any_small_vocabulary_round_trips_text(data):
    kinds = st.sampled_from([NORMAL, UNUSED, CONTROL, USER])
    piece = st.tuples(st.text("ab▁c\0é", max_size=4), st.floats(-9, 9, width=32), kinds)
    pieces = data.draw(st.lists(piece.filter(lambda entry: entry[2] != UNUSED or entry[0] != "▁"), max_size=12))
    tokenizer = Tokenizer.from_metadata(small(*pieces, *LETTERS, add_space_prefix=False))
    text = data.draw(st.text("abcé \0", max_size=20))
    assert tokenizer.decode(tokenizer.encode(text)) == text
