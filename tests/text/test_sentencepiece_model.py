"""The format of SentencePiece's model file, against the `sentencepiece` package."""

from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st

from fiddler.text.sentencepiece_model import ModelType, SentencePieceModel, TokenType, WireFormatError
from oracles.texts import REAL_MODEL

RAW = REAL_MODEL.read_bytes()
TINY = SentencePieceModel(
    pieces=(b"<unk>", b"<s>", b"a", "▁é".encode()),
    scores=(0.0, -1.5, -2.0, 3.25),
    types=(TokenType.UNKNOWN, TokenType.CONTROL, TokenType.NORMAL, TokenType.USER_DEFINED),
    model_type=ModelType.BPE,
    normalizer=b"identity",
    remove_extra_whitespaces=False,
)


def test_the_real_model_reads_as_the_library_reads_it():
    model, oracle = SentencePieceModel.from_bytes(RAW), sentencepiece.SentencePieceProcessor(model_proto=RAW)
    ids = range(oracle.vocab_size())
    assert [piece.decode() for piece in model.pieces] == [oracle.id_to_piece(i) for i in ids]
    assert list(model.scores) == [oracle.get_score(i) for i in ids]
    flags = {
        TokenType.CONTROL: oracle.is_control,
        TokenType.UNKNOWN: oracle.is_unknown,
        TokenType.BYTE: oracle.is_byte,
        TokenType.UNUSED: oracle.is_unused,
    }
    for kind, oracle_says in flags.items():
        assert [type_ == kind for type_ in model.types] == [oracle_says(i) for i in ids]
    assert (model.model_type, model.byte_fallback, model.normalizer) == (ModelType.BPE, True, b"identity")
    assert (model.add_dummy_prefix, model.remove_extra_whitespaces, model.has_charsmap) == (True, False, False)


def test_the_real_model_is_the_same_after_writing_and_reading():
    model = SentencePieceModel.from_bytes(RAW)
    written = model.to_bytes()
    assert SentencePieceModel.from_bytes(written) == model
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_proto=one) for one in (written, RAW))
    text = "The  quick brown 狐 jumps\n\tover <s> 😀"
    assert ours.encode(text) == theirs.encode(text)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.binary(max_size=300), st.floats(width=32, allow_nan=False), st.sampled_from(TokenType)), min_size=1
    ),
    st.sampled_from(ModelType),
    st.tuples(*[st.booleans()] * 5),
    st.binary(max_size=9),
)
def test_any_written_model_reads_back_equal(pieces, model_type, flags, name):
    model = SentencePieceModel(
        *(tuple(column) for column in zip(*pieces, strict=True)),
        model_type=model_type,
        byte_fallback=flags[0],
        treat_whitespace_as_suffix=flags[1],
        add_dummy_prefix=flags[2],
        remove_extra_whitespaces=flags[3],
        escape_whitespaces=flags[4],
        normalizer=name,
    )
    assert SentencePieceModel.from_bytes(model.to_bytes()) == model


def test_fields_left_out_have_the_formats_defaults():
    model = SentencePieceModel.from_bytes(b"\x0a\x03\x0a\x01a")
    assert model == SentencePieceModel((b"a",), (0.0,), (TokenType.NORMAL,))
    assert (model.model_type, model.add_dummy_prefix, model.remove_extra_whitespaces) == (ModelType.UNIGRAM, True, True)


def test_unknown_fields_are_skipped():
    # self_test_data (4, a string), an extension as varint, one as fixed64
    extra = b"\x22\x02hi" + b"\xc0\x0c\x07" + b"\xc9\x0c" + bytes(8)
    assert SentencePieceModel.from_bytes(extra + TINY.to_bytes() + extra) == TINY


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no pieces"),
        (b"\x0a", "truncated"),
        (b"\x0a\x05abc", "truncated"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "truncated"),
        (b"\xff" * 11, "64 bits"),
        (b"\x00\x01", "field number 0"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "pieces is not"),
        (b"\x0a\x02\x08\x01", "piece is not"),
        (b"\x0a\x02\x10\x01", "score is not"),
        (b"\x0a\x03\x1a\x01a", "type is not"),
        (b"\x12\x03\x1a\x01a", "model_type is not"),
        (b"\x1a\x02\x08\x01", "normalizer is not"),
        (b"\x15abc", "truncated"),
    ],
)
def test_damaged_bytes_are_refused_with_the_reason(data, message):
    with pytest.raises(WireFormatError, match=message):
        SentencePieceModel.from_bytes(data)


def test_a_truncated_model_is_refused_or_has_fewer_pieces():
    whole = TINY.to_bytes()
    for length in range(len(whole)):
        try:
            model = SentencePieceModel.from_bytes(whole[:length])
        except WireFormatError:
            continue
        assert model.pieces == TINY.pieces[: len(model.pieces)]
        assert model != TINY


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_model_or_raise_wire_format_error(data):
    for candidate in (data, TINY.to_bytes()[:40] + data):
        try:
            model = SentencePieceModel.from_bytes(candidate)
        except WireFormatError:
            continue
        assert len(model.pieces) == len(model.scores) == len(model.types) > 0
