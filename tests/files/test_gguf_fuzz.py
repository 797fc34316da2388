"""Random damage to small model files of every family: it is opened or refused in one line; nothing else happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from fiddler.errors import FiddlerError
from fiddler.files.inspection import describe, to_text
from fiddler.files.model_file import ModelFile
from fiddler.models.architecture import EXPERTS
from oracles.bad_gguf import (
    BF16,
    F16,
    F32,
    Draft,
    Entry,
    dense_llama,
    f32,
    floats,
    ints,
    mixtral,
    old_mixtral,
    texts,
)
from oracles.gguf_values import KEYS, NAMES, VALUES, VOCABULARY_KEYS
from oracles.small_families import GOOD, drafted

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
            model.file.array(name).sum()  # every byte of the data can be read
        for name, tensor in model.config.tensors(tied=model.tied).items():
            _ = model.experts(name) if tensor.role in EXPERTS else model.bits(name)
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
    draft: Draft = data.draw(st.sampled_from((mixtral, old_mixtral, dense_llama)))()
    keys = [key for key, _ in draft.pairs]
    values = [value for _, value in draft.pairs]
    extra = ["general.alignment", "llama.rope.scaling.type", "llama.attention.sliding_window", "split.count"]
    extra += ["tokenizer.ggml.eot_token_id", "tokenizer.chat_template", "tokenizer.ggml.add_space_prefix"]
    extra += ["llama.rope.scaling.factor", "llama.attention.causal", "fiddler.tokenizer.prepend_scheme"]
    extra += ["llama.expert_count", "llama.expert_used_count"]
    for _ in range(data.draw(st.integers(1, 2))):
        draft.set(data.draw(st.sampled_from(keys + extra)), data.draw(st.sampled_from(values)))
    open_all(path, draft.to_bytes())


def changed_value(draft: Draft, family: str, draw) -> None:
    """Another value under a key that the file has, or that some family has; or a key less."""
    keys = [key for key, _ in draft.pairs]
    keys += [*(f"{family}.{key}" for key in KEYS), *(f"tokenizer.ggml.{key}" for key in VOCABULARY_KEYS)]
    keys += ["fiddler.rope.yarn_truncate", "fiddler.tokenizer.ignore_merges", "fiddler.tokenizer.normalizer"]
    key = draw(st.sampled_from(keys))
    if key in dict(draft.pairs) and draw(st.integers(0, 9)) == 0:
        draft.drop(key)
    else:
        draft.set(key, draw(st.sampled_from(VALUES + tuple(value for _, value in draft.pairs))))


def changed_tensor(draft: Draft, draw) -> None:
    """A tensor of another shape, type or name; one more, one less, or two exchanged."""
    entry = draw(st.sampled_from(draft.entries))
    kind = draw(st.integers(0, 5))
    if kind == 0:
        draft.entries.remove(entry)
    elif kind == 1:
        size = st.sampled_from((1, 2, 4, 6, 8, 16, 24, 32, 48, 262))
        entry.shape = draw(st.lists(size, min_size=1, max_size=4))
    elif kind == 2:
        entry.kind = draw(st.sampled_from((F32, F16, BF16)))
    elif kind == 3:
        layer = draw(st.sampled_from(("blk.0.", "blk.1.", "blk.2.", "blk.01.", "blk.4294967295.", "blk..", "")))
        entry.name = layer + str(entry.name).split(".", 2)[-1]
    elif kind == 4:
        draft.entries.append(Entry(draw(st.sampled_from(NAMES)), list(entry.shape), entry.kind))
    else:
        other = draw(st.sampled_from(draft.entries))
        entry.name, other.name = other.name, entry.name


def damaged(data) -> Draft:
    """The smallest model of a family with one to three changes."""
    family = data.draw(st.sampled_from(sorted(GOOD)))
    draft = drafted(family, byte_level=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.integers(0, 2)):
            changed_value(draft, family, data.draw)
        else:
            changed_tensor(draft, data.draw)
    return draft


@pytest.mark.parametrize("byte_level", [False, True])
@pytest.mark.parametrize("family", GOOD)
def test_the_undamaged_file_of_a_family_opens(path, family, byte_level):
    path.write_bytes(drafted(family, byte_level=byte_level).to_bytes())
    model = ModelFile.open(path)
    model.check_runnable()
    assert model.tokenizer.decode(model.tokenizer.encode("abc é")) == "abc é"


@pytest.mark.parametrize("value", [ints([]), ints([1, 3]), floats([0.5]), texts([]), f32(float("nan"))], ids=repr)
@pytest.mark.parametrize("family", ["qwen3moe", "deepseek2", "gpt-oss"])
def test_a_value_of_another_type_under_any_key_is_opened_or_refused(path, family, value):
    keys = [key for key, _ in drafted(family, byte_level=True).pairs]
    for key in (*keys, *(f"{family}.{key}" for key in KEYS), "split.count", "split.no", "split.tensors.count"):
        draft = drafted(family, byte_level=True)
        draft.set(key, value)
        open_all(path, draft.to_bytes())


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_changed_keys_and_tensors_of_every_family_are_opened_or_refused(path, data):
    open_all(path, damaged(data).to_bytes())
