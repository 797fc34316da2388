"""Tokenizer settings come from several files: their precedence, and the errors if they contradict each other."""

from __future__ import annotations

import json

import gguf
import pytest
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.errors import CheckpointError
from oracles.texts import CONFIG
from oracles.vocabularies import CONTROL, NORMAL, SMALL, UNKNOWN, UNUSED, USER, saved, sentencepiece_model, vocabulary

MODEL = sentencepiece_model()  # 262 tokens
TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}


def read(folder, size=270, **files):
    return vocabulary(folder, size, **({"tokenizer_model": MODEL} | files))


def test_a_short_vocabulary_is_padded_with_unused_tokens(tmp_path):
    vocab = read(tmp_path, 265)
    assert vocab.tokens[261:] == ("b", "[PAD262]", "[PAD263]", "[PAD264]")
    assert vocab.types[261:] == (NORMAL, UNUSED, UNUSED, UNUSED)
    assert len(vocab.scores) == 265


def test_padding_avoids_the_names_of_existing_tokens(tmp_path):
    vocab = read(tmp_path, 265, added_tokens_json={"[PAD262]": 264})
    assert vocab.tokens[262:] == ("[PAD262]_", "[PAD263]", "[PAD262]")


def test_a_vocabulary_longer_than_vocab_size_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"262 tokens, but vocab_size in config.json is 261"):
        read(tmp_path, 261)


def test_added_tokens_of_all_files_are_combined(tmp_path):
    vocab = read(
        tmp_path,
        added_tokens_json={"<u>": 262, "<s2>": 263},
        special_tokens_map_json={"additional_special_tokens": ["<s2>", {"content": "<s3>"}]},
        tokenizer_json={"added_tokens": [{"id": 264, "content": "<s3>"}, {"id": 1, "content": "<s>", "special": True}]},
        tokenizer_config_json={
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "260": {"content": "a", "special": False},
                "265": {"content": "<s5>", "special": True},
                "266": {"content": "<|chat|>", "special": False},
            }
        },
    )
    assert vocab.tokens[262:268] == ("<u>", "<s2>", "<s3>", "<s5>", "<|chat|>", "[PAD267]")
    assert vocab.types[262:268] == (USER, CONTROL, CONTROL, CONTROL, CONTROL, UNUSED)
    assert (vocab.types[0], vocab.types[1], vocab.types[260]) == (UNKNOWN, CONTROL, USER)


def test_an_added_token_may_rename_a_control_token_but_no_ordinary_one(tmp_path):
    assert read(tmp_path, added_tokens_json={"[INST]": 1}).tokens[1] == "[INST]"
    for index in (260, 13):
        with pytest.raises(CheckpointError, match="claims its id"):
            read(tmp_path, added_tokens_json={"[INST]": index})


def test_contradictory_and_impossible_added_tokens_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="'<u>' in one of its files and '<v>' in another"):
        read(
            tmp_path,
            added_tokens_json={"<u>": 262},
            tokenizer_config_json={"added_tokens_decoder": {"262": {"content": "<v>"}}},
        )
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokens 260 and 262 are both called 'a'"):
        read(tmp_path, added_tokens_json={"a": 262})
    with pytest.raises(CheckpointError, match=r"token 262 is 'x\\x00'"):
        read(tmp_path, added_tokens_json={"x\0": 262})


@pytest.mark.parametrize(
    "files, bos, eos",
    [
        ({}, 1, 2),
        ({"tokenizer_config_json": {"bos_token": None, "eos_token": {"content": "b"}}}, 1, 261),
        ({"special_tokens_map_json": {"bos_token": "a", "eos_token": "<nowhere>"}}, 260, 2),
        ({"special_tokens_map_json": {"bos_token": "a"}, "tokenizer_config_json": {"bos_token": "b"}}, 261, 2),
        ({"config_json": CONFIG | {"bos_token_id": 5, "eos_token_id": 6}}, 1, 2),
    ],
)
def test_special_tokens_are_found_by_name_before_id(tmp_path, files, bos, eos):
    vocab = read(tmp_path, **files)
    assert (vocab.bos_id, vocab.eos_id) == (bos, eos)
    assert (vocab.types[bos], vocab.types[eos]) == (CONTROL, CONTROL)


@pytest.mark.parametrize(
    "config, generation, bos, eos, more",
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, 1, 2, ()),
        ({"eos_token_id": [2, 260, 261, 259]}, {}, None, 2, (260, 261)),
        ({"eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": [260, 2]}, 1, 2, (260,)),
        ({}, {"eos_token_id": 260}, None, 260, ()),
    ],
)
def test_special_tokens_are_found_by_id_if_no_file_names_them(tmp_path, config, generation, bos, eos, more):
    files = {"config_json": {"vocab_size": 270} | config, "generation_config_json": generation}
    vocab = vocabulary(tmp_path, 270, tokenizer_json=saved(SMALL), **files)
    assert (vocab.bos_id, vocab.eos_id, vocab.more_end_ids, vocab.add_bos) == (bos, eos, more, bos is not None)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"set eos_token in tokenizer_config.json"):
        vocabulary(tmp_path, 270, tokenizer_json=saved(SMALL), config_json={})


def test_the_padding_token_is_optional_and_keeps_its_type(tmp_path):
    assert read(tmp_path, config_json=CONFIG | {"pad_token_id": -1}).pad_id is None
    assert read(tmp_path, config_json=CONFIG | {"pad_token_id": 265}).pad_id == 265
    assert read(tmp_path, tokenizer_config_json={"pad_token": "a"}).types[260] == NORMAL


@pytest.mark.parametrize(
    "config, template, bos, eos",
    [
        ({}, None, True, False),
        ({"add_bos_token": None}, None, True, False),
        ({"add_bos_token": False, "add_eos_token": True}, None, False, True),
        ({}, TEMPLATE, True, False),
        ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, True, False),
        ({}, TEMPLATE | {"single": TEMPLATE["single"][::-1]}, False, True),
        ({}, TEMPLATE | {"single": TEMPLATE["single"][1:]}, False, False),
        ({"add_bos_token": True}, TEMPLATE | {"single": TEMPLATE["single"][1:]}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_the_post_processor_or_else_the_configuration_says(
    tmp_path, config, template, bos, eos
):
    fast = {"tokenizer_json": {"post_processor": template}} if template else {}
    vocab = read(tmp_path, tokenizer_config_json=config, **fast)
    assert (vocab.add_bos, vocab.add_eos) == (bos, eos)


def test_the_space_before_a_text_is_added_unless_the_model_switches_it_off(tmp_path):
    assert read(tmp_path, tokenizer_config_json={"add_prefix_space": None}).add_space_prefix
    assert not read(tmp_path, tokenizer_model=sentencepiece_model(add_dummy_prefix=False)).add_space_prefix


def test_chat_templates_are_read_by_the_precedence_of_their_files(tmp_path):
    assert read(tmp_path).chat_template is None
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert read(tmp_path, tokenizer_config_json={"chat_template": named}).chat_template == "d"
    assert read(tmp_path, tokenizer_config_json={"chat_template": named}).more_templates == {"tools": "t"}
    assert read(tmp_path, tokenizer_config_json={"chat_template": named[:1]}).chat_template is None
    assert read(tmp_path, tokenizer_config_json={"chat_template": "c"}).chat_template == "c"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "j"}')
    assert read(tmp_path).chat_template == "j"
    (tmp_path / "chat_template.jinja").write_text("{{ 'é' }}\n", encoding="utf-8")
    assert read(tmp_path).chat_template == "{{ 'é' }}\n"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja"):
        read(tmp_path)


def test_chat_templates_saved_by_transformers_are_written_as_by_the_gguf_package(tmp_path):
    templates = {"default": "{{ d }}", "tool_use": "{{ t }}", "rag-1": "{{ r }}"}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    (tmp_path / "fast").mkdir()
    fast = PreTrainedTokenizerFast(tokenizer_object=SMALL, eos_token="</s>", chat_template=named)
    fast.save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast" / "additional_chat_templates" / "tool_use.jinja").exists()
    for vocab in (
        vocabulary(tmp_path / "fast", 300),
        read(tmp_path / "list", tokenizer_config_json={"chat_template": named}),
    ):
        theirs, ours = (gguf.GGUFWriter(tmp_path / name, "llama") for name in ("theirs", "ours"))
        theirs.add_chat_template(named)
        vocab.write_to(ours)
        values = [
            {key: one.value for key, one in writer.kv_data[0].items() if "chat_template" in key}
            for writer in (theirs, ours)
        ]
        for one in values:
            one["tokenizer.chat_templates"] = set(one["tokenizer.chat_templates"])  # gguf's order is a set's
        assert values[0] == values[1]
        assert len(values[0]) == 4


WRONG = {
    "flag": ({"tokenizer_config_json": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'"),
    "name": ({"tokenizer_config_json": {"eos_token": 5}}, "eos_token is 5"),
    "template": ({"tokenizer_config_json": {"chat_template": 5}}, "chat_template is 5"),
    "list of templates": ({"tokenizer_config_json": {"chat_template": [{"name": "default"}]}}, "name and template"),
    "decoder": ({"tokenizer_config_json": {"added_tokens_decoder": 5}}, "added_tokens_decoder is 5"),
    "decoder's key": ({"tokenizer_config_json": {"added_tokens_decoder": {"-1": {"content": "x"}}}}, "'-1' is"),
    "decoder's token": ({"tokenizer_config_json": {"added_tokens_decoder": {"262": "x"}}}, "262 is 'x'"),
    "added token's id": ({"added_tokens_json": {"x": "262"}}, None),
    "added token's ids": ({"added_tokens_json": {"x": [262]}}, "it must be an id and a token"),
    "a list for an object": ({"added_tokens_json": ["x"]}, "it must be a JSON object"),
    "eos of text": ({"generation_config_json": {"eos_token_id": "2"}}, "eos_token_id is '2'"),
    "eos beyond": ({"generation_config_json": {"eos_token_id": [2, 270]}}, r"eos_token_id is \[2, 270\]"),
    "no eos": ({"generation_config_json": {"eos_token_id": -1}}, "eos_token_id is -1"),
    "not a model": ({"tokenizer_model": b"\x0a\xff"}, "not a SentencePiece model: .*truncated"),
    "no bytes": (
        {"tokenizer_model": b"\x0a\x03\x0a\x01a\x12\x05\x18\x02\x98\x02\x01\x1a\x02\x20\x00"},
        "lacks the byte token <0x00>",
    ),
    "no UTF-8": ({"tokenizer_model": sentencepiece_model((b"\xff", NORMAL))}, "piece 262 is not UTF-8"),
    "unknown type": ({"tokenizer_model": sentencepiece_model((b"x", 9))}, "piece 262 is of the unknown type 9"),
    "byte's name": ({"tokenizer_model": sentencepiece_model((b"<0x1>", 6))}, "byte token called '<0x1>'"),
    "empty name": ({"tokenizer_model": sentencepiece_model((b"", NORMAL))}, "token 262 is ''"),
    "twice": ({"tokenizer_model": sentencepiece_model((b"a", NORMAL))}, "both called 'a'"),
    "model type": ({"tokenizer_model": sentencepiece_model(model_type=77)}, "SentencePiece 77 model"),
    "escapes": ({"tokenizer_model": sentencepiece_model(escape_whitespaces=False)}, "escape_whitespaces is off"),
}


@pytest.mark.parametrize("files, message", WRONG.values(), ids=WRONG)
def test_errors_name_the_wrong_value(tmp_path, files, message):
    if message is None:
        assert read(tmp_path, **files).tokens[262] == "x"
        return
    with pytest.raises(CheckpointError, match=message) as raised:
        read(tmp_path, **files)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff{}", b'{"a": 1, "a": 2}', b"[" * 100000, b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_files_that_are_no_json_object_are_refused(tmp_path, name, content):
    read(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read_vocabulary(tmp_path, 270)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither tokenizer.model nor tokenizer.json"):
        vocabulary(tmp_path, 270)


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.sampled_from(["<s>", "a", "▁"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["content", "type", "id", "single"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.data())
def test_arbitrary_values_raise_only_checkpoint_errors_of_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    keys = ["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model"]
    fast = saved(SMALL) | data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=2))
    more = [
        "bos_token",
        "eos_token",
        "added_tokens_decoder",
        "chat_template",
        "add_bos_token",
        "additional_special_tokens",
    ]
    config = data.draw(st.dictionaries(st.sampled_from(more), VALUES, max_size=2))
    ids = data.draw(
        st.dictionaries(st.sampled_from(["bos_token_id", "eos_token_id", "pad_token_id"]), VALUES, max_size=2)
    )
    files = {
        "tokenizer_config_json": config,
        "generation_config_json": ids,
        "tokenizer_json": json.loads(json.dumps(fast)),
    }
    try:
        vocab = vocabulary(folder, 300, **files)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
        assert len(vocab.tokens) == len(set(vocab.tokens)) == len(vocab.types) == 300
    assert "\n" not in message
