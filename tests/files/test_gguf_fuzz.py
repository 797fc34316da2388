"""Random damage to a small model file: it is opened or refused in one line; nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.errors import FiddlerError
from fiddler.files.inspection import describe, to_text
from fiddler.files.model_file import ModelFile
from oracles.bad_gguf import Draft, dense_llama, mixtral

DRAFT = mixtral()
CONTENT = DRAFT.to_bytes()
HEADER = DRAFT.ends["padding"]
INTERESTING = (0, 1, 2, 7, 8, 9, 0x7F, 0x80, 0xFF)


def sparse_positions() -> list[int]:
    """Positions in the header outside the long arrays: these are most of it and break in one way each."""
    arrays = CONTENT.index(b"tokenizer.ggml.tokens") + 64, CONTENT.index(b"tokenizer.ggml.bos_token_id") - 64
    return [*range(arrays[0]), *range(arrays[1], HEADER)]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


def open_all(path: Path, content: bytes) -> None:
    """Do all that `run` does before it imports torch, and all that `inspect` does."""
    path.write_bytes(content)
    refusal = "no refusal"
    try:
        model = ModelFile.open(path)
        assert to_text(describe(path)).replace("\n", " ").isprintable()
        model.check_runnable()
        _ = model.tokenizer
        for name in model.file.tensors:
            model.bits(name)[0].sum()  # every byte of the data can be read
    except FiddlerError as error:
        refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) < 1000


FLIPS = st.lists(
    st.tuples(st.sampled_from(sparse_positions()), st.sampled_from(INTERESTING) | st.integers(0, 255)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(FLIPS)
def test_a_header_with_changed_bytes_is_opened_or_refused(path, flips):
    content = bytearray(CONTENT)
    for position, value in flips:
        content[position] = value
    open_all(path, bytes(content))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, HEADER - 1), st.integers(0, 7))
def test_a_header_with_a_flipped_bit_is_opened_or_refused(path, position, bit):
    content = bytearray(CONTENT)
    content[position] ^= 1 << bit
    open_all(path, bytes(content))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, HEADER - 1), st.integers(0, 64), st.binary(max_size=16))
def test_a_header_with_bytes_cut_out_and_inserted_is_opened_or_refused(path, begin, length, inserted):
    open_all(path, CONTENT[:begin] + inserted + CONTENT[begin + length :])


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_after_the_magic_are_opened_or_refused(path, noise):
    open_all(path, b"GGUF\3\0\0\0" + noise)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_other_values_under_known_keys_are_opened_or_refused(path, data):
    """Whole values of any type: a flipped byte rarely gets past the container."""
    draft: Draft = data.draw(st.sampled_from((mixtral, dense_llama)))()
    keys = [key for key, _ in draft.pairs]
    values = [value for _, value in draft.pairs]
    extra = ["general.alignment", "llama.rope.scaling.type", "llama.attention.sliding_window", "split.count"]
    extra += ["tokenizer.ggml.eot_token_id", "tokenizer.chat_template", "tokenizer.ggml.add_space_prefix"]
    extra += ["llama.rope.scaling.factor", "llama.attention.causal", "fiddler.tokenizer.prepend_scheme"]
    extra += ["llama.expert_count", "llama.expert_used_count"]
    for _ in range(data.draw(st.integers(1, 2))):
        draft.set(data.draw(st.sampled_from(keys + extra)), data.draw(st.sampled_from(values)))
    open_all(path, draft.to_bytes())
