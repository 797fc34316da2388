"""Chat ids of Mixtral-Instruct folders are those of transformers' AutoTokenizer, whichever file says so.

Both of Mistral's SentencePiece tokenizers, version 1 (Mixtral-8x7B) and 3 (Mixtral-8x22B); whole, and cut to a thousand
pieces for the table of all folders.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import product
from pathlib import Path

import mistral_common
import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.errors import CheckpointError
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.sentencepiece_model import ModelType, SentencePieceModel, TokenType
from fiddler.text.tokenizer import Tokenizer
from oracles.texts import write_folder

pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")

DATA = Path(mistral_common.__file__).parent / "data"
FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
BARE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
TURNS = [
    ["Hello there", "Hi!", "Why?"],
    ["  two spaces  ", " one", "\n\nnew lines\n"],
    ["", "", "empty before"],
    ["▁", "▁▁", " ▁ "],
    ["def f(x):\n    return x\t# é", "Ångström, 你好 😀", "a  b   c"],
    ["[INST [/INST ] <s /s>", "</", "<unk"],
    ["[REFERENCE_DOC_1]y", "x[REFERENCE_DOC_2] y", " [REFERENCE_DOC_3]"],
    ["1+1=2", "2", "x" * 40],
    ["Donaudampfschiff", "the quick brown fox", "return lambda self.__init__ !=-1"],
    ["one turn"],
]
CHATS = [[{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)] for texts in TURNS]
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FORMS = {  # normaliser and pre-tokenizer of tokenizer.json as they are published
    "older": ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]}, None),
    "always": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}),
    "first": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}),
    "never": (None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}),
}
LEGACY = {"true": {"legacy": True}, "false": {"legacy": False}, "absent": {}}


@cache
def model(version, whole=False):
    found = SentencePieceModel.from_bytes((DATA / FILES[version]).read_bytes())
    chosen = range(len(found.pieces))
    if not whole:
        chosen = [n for n in chosen if n < 1200 or len(found.pieces[n].decode()) == 1]
    parts = ([values[n] for n in chosen] for values in (found.pieces, found.scores, found.types))
    options = {"model_type": ModelType.BPE, "byte_fallback": True, "remove_extra_whitespaces": False}
    return SentencePieceModel(*map(tuple, parts), **options)


@cache
def published(version, form):
    """A tokenizer.json in one of the published forms, from the merges that transformers derives."""
    pieces = model(version)
    names = [piece.decode() for piece in pieces.pieces]
    ids = {name: index for index, name in enumerate(names)}
    special = [n for n, kind in enumerate(pieces.types) if kind in (TokenType.CONTROL, TokenType.UNKNOWN)]
    scores = {name: pieces.scores[n] for name, n in ids.items() if pieces.types[n] == TokenType.NORMAL}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    normalizer, pre_tokenizer = FORMS[form]
    bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
    return {
        "version": "1.0",
        "added_tokens": [{"id": n, "content": names[n]} | flags for n in special],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": bos},
        },
        "decoder": None,
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [list(pair) for pair in generate_merges({name: ids[name] for name in scores}, scores)],
        },
    }


def folder(path, version, *, with_model=True, tokenizer_json=None, whole=False, **config):
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    files = {
        "tokenizer_config_json": {"tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE} | special | config
    }
    if with_model:
        files["tokenizer_model"] = model(version, whole).to_bytes()
    if tokenizer_json is not None:
        files["tokenizer_json"] = tokenizer_json
    return write_folder(path, config_json={"model_type": "mixtral", "vocab_size": 32768}, **files)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The tokenizer.json that transformers saves for a tokenizer.model alone, by version, legacy and wholeness."""

    @cache
    def of(version, legacy, whole=False):
        path = folder(tmp_path_factory.mktemp("saved"), version, whole=whole, legacy=legacy)
        AutoTokenizer.from_pretrained(path).save_pretrained(path)
        return json.loads((path / "tokenizer.json").read_text())

    return of


def ids_of_both(path):
    """Ours and transformers' ids of every conversation, by two templates, and of some plain texts."""
    found = read_vocabulary(path, 32768)
    ours, theirs = Tokenizer.from_metadata(found.metadata()), AutoTokenizer.from_pretrained(path)
    pairs = []
    for template, chat in product((TEMPLATE, BARE), CHATS):
        expected = theirs.apply_chat_template(chat, chat_template=template, tokenize=True, return_dict=False)
        text = theirs.apply_chat_template(chat, chat_template=template, tokenize=False)
        pairs.append((ours.encode(text, parse_special=True), expected))
    for text in {text for texts in TURNS for text in texts}:
        pairs.append(
            (ours.encode(text, add_bos=True, parse_special=True), [1, *theirs.encode(text, add_special_tokens=False)])
        )
    return found, [ours for ours, _ in pairs], [theirs for _, theirs in pairs]


@pytest.mark.parametrize("legacy", LEGACY)
@pytest.mark.parametrize("version", FILES)
def test_ids_of_tokenizer_model_alone(tmp_path, version, legacy):
    found, ours, theirs = ids_of_both(folder(tmp_path, version, **LEGACY[legacy]))
    assert ours == theirs
    assert found.prepend_scheme == ("first" if legacy == "false" else None)
    assert found.source_warnings == ()


@pytest.mark.parametrize("form", [*FORMS, "saved with legacy", "saved without"])
@pytest.mark.parametrize("with_model", [False, True], ids=["tokenizer.json alone", "both"])
@pytest.mark.parametrize("version", FILES)
def test_ids_of_tokenizer_json_with_and_without_tokenizer_model(tmp_path, saved, version, with_model, form):
    content = published(version, form) if form in FORMS else saved(version, form == "saved with legacy")
    for legacy, config in LEGACY.items():
        path = folder(tmp_path / legacy, version, with_model=with_model, tokenizer_json=content, **config)
        found, ours, theirs = ids_of_both(path)
        assert ours == theirs
        after_special = form in ("older", "always", "saved with legacy")
        contradicts = form != "never" and legacy == ("false" if after_special else "true")
        assert any(f"says legacy {legacy}" in line for line in found.source_warnings) == contradicts
        disagrees = with_model and form == "never"
        assert any("disagree on a space" in line for line in found.source_warnings) == disagrees
        assert len(found.source_warnings) == contradicts + disagrees


@pytest.mark.parametrize(
    "version, legacy, form",
    [("v1", None, None), ("v1", False, None), ("v3", True, None), ("v3", False, None), ("v3", True, "saved")],
)
def test_chat_ids_of_the_whole_vocabularies(tmp_path, saved, version, legacy, form):
    config = {} if legacy is None else {"legacy": legacy}
    content = saved(version, False, True) if form else None
    path = folder(tmp_path, version, whole=True, tokenizer_json=content, **config)
    metadata = read_vocabulary(path, 32768).metadata()
    tokenizer, theirs = Tokenizer.from_metadata(metadata), AutoTokenizer.from_pretrained(path)
    template = ChatTemplate.of(tokenizer, metadata)
    try:
        for chat in CHATS:
            assert template.ids(chat) == theirs.apply_chat_template(chat, tokenize=True, return_dict=False)
    finally:
        template.close()


def test_files_with_other_tokens_or_merges_are_reported_and_tokenizer_json_is_followed(tmp_path):
    content = json.loads(json.dumps(published("v1", "older")))
    ids = content["model"]["vocab"]
    ids["he"], ids["th"] = ids["th"], ids["he"]
    found, ours, theirs = ids_of_both(folder(tmp_path / "tokens", "v1", tokenizer_json=content))
    assert ours == theirs
    (line,) = found.source_warnings
    assert "tokenizer.model and tokenizer.json disagree on token" in line
    assert line.endswith("; tokenizer.json is followed, as in transformers")
    content = json.loads(json.dumps(published("v1", "older")))
    content["model"]["merges"].reverse()
    found, ours, theirs = ids_of_both(folder(tmp_path / "merges", "v1", tokenizer_json=content))
    assert ours == theirs
    assert "disagree on the merges of" in found.source_warnings[0]


def test_a_tokenizer_json_that_scores_cannot_follow_gives_way_to_the_model_with_a_warning(tmp_path):
    content = published("v1", "older") | {"normalizer": {"type": "NFC"}}
    found = read_vocabulary(folder(tmp_path, "v1", tokenizer_json=content), 32768)
    (line,) = found.source_warnings
    assert "normalizer is 'NFC'" in line
    assert "tokenizer.model is used, and some texts may get other ids than in transformers" in line
    vocab = dict(content["model"]["vocab"])
    vocab["he"], vocab["th"] = vocab["th"], vocab["he"]
    content["model"] = content["model"] | {"vocab": vocab}
    with pytest.raises(CheckpointError, match=r"disagrees on token .*keep the file that belongs to these weights"):
        read_vocabulary(folder(tmp_path, "v1", tokenizer_json=content), 32768)


def test_add_prefix_space_is_not_read_and_a_contradiction_is_reported(tmp_path):
    found, ours, theirs = ids_of_both(folder(tmp_path, "v3", add_prefix_space=False))
    assert ours == theirs
    assert found.add_space_prefix
    assert "add_prefix_space false, which transformers does not read" in found.source_warnings[0]


def test_a_template_in_tokenizer_json_decides_on_bos_and_a_contradiction_is_reported(tmp_path):
    path = folder(tmp_path, "v1", tokenizer_json=published("v1", "older"), add_bos_token=False)
    found = read_vocabulary(path, 32768)
    assert AutoTokenizer.from_pretrained(path).encode("a")[0] == 1
    assert found.add_bos
    assert "add_bos_token false, but tokenizer.json adds it" in found.source_warnings[0]
