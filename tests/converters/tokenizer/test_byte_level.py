"""Byte-level BPE from `tokenizer.json`: a folder's ids through a GGUF are its AutoTokenizer's, or it is refused."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from fiddler.errors import CheckpointError
from fiddler.text.byte_level_keys import IGNORE_MERGES, NORMALIZER
from fiddler.text.pre_tokenizers import PRE_TOKENIZERS
from fiddler.text.sentencepiece_model import TokenType
from fiddler.text.vocabulary import ADDED_TOKEN_IDS
from oracles.byte_level import STEPS, byte_level, split, through_a_file, trained
from oracles.texts import texts
from oracles.vocabularies import saved, vocabulary

SPECIAL = [AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>", "<|end▁x|>")]
PLAIN = [
    AddedToken("<think>", normalized=False),
    AddedToken("<thi", normalized=False),
    AddedToken("k> a", normalized=False),
]
OPTIONS = [
    AddedToken("<l>", lstrip=True, normalized=False),
    AddedToken("<r>", rstrip=True, normalized=False, special=True),
    AddedToken("<w>", single_word=True, normalized=False),
    AddedToken("é<n>", normalized=True),
]
CONFIGURATION = {"eos_token": "<|im_end|>", "pad_token": None, "bos_token": None}
TEXTS = texts()[::4]
DECOMPOSED = ["e\u0301", "\u1100\u1161\u11a8", "a\u0328\u0301", "\u212b", "\u0958", "e\u0301<n>e\u0301", "é<n>"]


def strings(added, count=400):
    """Texts as they are, and texts with special tokens in them."""
    source = random.Random(7)
    parts = [*TEXTS, *DECOMPOSED, " ", "  ", "\n", "a", "_"]
    names = [token.content for token in added] + ["<think", "|>"]
    marked = ["".join(source.choice(source.choice((names, parts))) for _ in range(7)) for _ in range(count)]
    return [*TEXTS, *DECOMPOSED, *marked]


def folder_of(path, tokenizer, model_type="", configuration=CONFIGURATION):
    files = {"config_json": {"model_type": model_type, "vocab_size": 1200}, "tokenizer_config_json": configuration}
    return vocabulary(path, 1200, tokenizer_json=saved(tokenizer), **files)


@pytest.mark.parametrize("pre", STEPS)
def test_ids_through_a_gguf_are_the_librarys_for_every_pre_tokenizer(tmp_path, pre):
    added = SPECIAL + PLAIN
    oracle = trained(pre, added)
    ours, keys = through_a_file(folder_of(tmp_path / "hf", oracle), tmp_path / "a.gguf")
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", pre)
    assert "tokenizer.ggml.scores" not in keys
    for text in strings(added):
        assert ours.encode(text, parse_special=True) == oracle.encode(text).ids
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        stream = ours.stream()
        assert "".join([stream.push(index) for index in ids]) == text
        assert stream.finish() == ""


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("pre", ["dbrx", "qwen2", "tekken"])
def test_a_word_that_is_a_token_is_that_token_where_the_file_says_so(tmp_path, pre, ignores):
    """Of a token that no merge makes; the name of the pre-tokenizer or a key of our own carries it."""
    oracle = trained(pre, SPECIAL)
    content = saved(oracle)
    content["model"]["vocab"]["Ġzyxwvu"] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = ignores
    for token in content["added_tokens"]:
        token["id"] += 1
    oracle = FastTokenizer.from_str(json.dumps(content))
    ours, keys = through_a_file(folder_of(tmp_path / "hf", oracle), tmp_path / "a.gguf")
    for text in ("a zyxwvu zyxwvu", "zyxwvu", *TEXTS[:300]):
        assert ours.encode(text, parse_special=True) == oracle.encode(text).ids
    assert (ours.token(ours.encode("a zyxwvu")[-1]) == "Ġzyxwvu") == ignores
    default = PRE_TOKENIZERS[keys["tokenizer.ggml.pre"]].ignore_merges
    assert keys.get(IGNORE_MERGES, default) == ignores


@pytest.mark.parametrize("nfc", [False, True])
def test_options_of_added_tokens_and_composed_characters_reach_the_gguf(tmp_path, nfc):
    added = SPECIAL + PLAIN + OPTIONS
    oracle = trained("qwen2", added, nfc)
    ours, keys = through_a_file(folder_of(tmp_path / "hf", oracle), tmp_path / "a.gguf")
    assert keys.get(NORMALIZER) == ("NFC" if nfc else None)
    found = {option: [ours.token(index) for index in keys[key]] for option, key in ADDED_TOKEN_IDS.items()}
    assert found == {"lstrip": ["<l>"], "rstrip": ["<r>"], "single_word": ["<w>"], "normalized": ["é<n>"]}
    for text in strings(added, 1500):
        assert ours.encode(text, parse_special=True) == oracle.encode(text).ids


FAMILIES = {
    "qwen3_moe": ("qwen2", "Qwen2Tokenizer", True),
    "olmoe": ("gpt-2", "GPTNeoXTokenizer", True),
    "deepseek_v3": ("deepseek-v3", "LlamaTokenizerFast", False),
    "granitemoe": ("refact", "GPT2Tokenizer", False),
    "glm4_moe": ("dbrx", "PreTrainedTokenizerFast", False),
    "dbrx": ("dbrx", "PreTrainedTokenizerFast", False),  # GPT2Tokenizer: transformers 5 ignores the pre-tokenizer
    "gpt_oss": ("gpt-4o", "PreTrainedTokenizerFast", False),
}


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_autotokenizers_for_the_folder_of_each_family(tmp_path, family):
    pre, name, nfc = FAMILIES[family]
    oracle = trained(pre, SPECIAL + PLAIN, nfc)
    configuration = CONFIGURATION | {"tokenizer_class": name, "add_bos_token": True, "bos_token": "<|im_start|>"}
    vocab = folder_of(tmp_path / "hf", oracle, family, configuration)
    ours, _ = through_a_file(vocab, tmp_path / "a.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in strings(SPECIAL + PLAIN, 300):
        assert ours.encode(text, add_bos=ours.add_bos, parse_special=True) == theirs(text).input_ids
    assert any("add_bos_token true, but tokenizer.json does not add it" in line for line in vocab.warnings)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ends", [False, True])
def test_bos_and_eos_come_from_the_post_processors_template(tmp_path, ends):
    oracle = trained("dbrx", SPECIAL)
    part = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    last = ({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},) if ends else ()
    ids = {token.content: {"id": token.content, "ids": [oracle.token_to_id(token.content)]} for token in SPECIAL}
    ids = {name: token | {"tokens": [name]} for name, token in ids.items()}
    template = {"type": "TemplateProcessing", "single": [*part, *last], "pair": [*part], "special_tokens": ids}
    steps = {"type": "Sequence", "processors": [byte_level(), template]}
    content = saved(oracle) | {"post_processor": steps}
    configuration = CONFIGURATION | {"bos_token": "<|im_start|>"}
    vocab = vocabulary(tmp_path, 1200, tokenizer_json=content, tokenizer_config_json=configuration)
    assert (vocab.add_bos, vocab.add_eos) == (True, ends)
    assert vocab.tokens[vocab.bos_id] == "<|im_start|>"
    ids = AutoTokenizer.from_pretrained(tmp_path)("a").input_ids
    assert (ids[0], ids[-1] == vocab.eos_id) == (vocab.bos_id, ends)


def test_types_padding_and_the_ends_of_a_vocabulary(tmp_path):
    oracle = trained("gpt-2", SPECIAL + PLAIN)
    vocab = folder_of(tmp_path, oracle)
    count = oracle.get_vocab_size()
    kinds = {name: TokenType(vocab.types[vocab.tokens.index(name)]).name for name in ("a", "<|im_start|>", "<think>")}
    assert kinds == {"a": "NORMAL", "<|im_start|>": "CONTROL", "<think>": "USER_DEFINED"}
    assert vocab.tokens[count:] == tuple(f"[PAD{index}]" for index in range(count, 1200))
    assert set(vocab.types[count:]) == {TokenType.UNUSED}
    ours, _ = through_a_file(vocab, tmp_path / "a.gguf")
    assert (ours.vocab_size, ours.end_ids) == (1200, {oracle.token_to_id("<|im_end|>")})
    assert ours.decode([count, oracle.token_to_id("<|im_end|>"), oracle.token_to_id("<think>")]) == "<think>"
    assert not set(range(count, 1200)) & set(ours.encode("[PAD1000] a[PAD1001]", parse_special=True))


def test_an_id_in_the_configuration_takes_no_letter_out_of_texts(tmp_path):
    config = {"vocab_size": 1200, "bos_token_id": 1, "eos_token_id": 2}
    vocab = vocabulary(tmp_path, 1200, tokenizer_json=saved(trained("gpt-2")), config_json=config)
    ours, _ = through_a_file(vocab, tmp_path / "a.gguf")
    assert (vocab.tokens[1:3], ours.bos_id, ours.eos_id, ours.end_ids) == (('"', "#"), 1, 2, {2})
    assert ours.decode(ours.encode('"#"')) == '"#"'


def test_merges_are_read_as_text_or_as_pairs_and_of_one_listed_twice_the_last_counts(tmp_path):
    content = saved(trained("gpt-2", SPECIAL))
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in content["model"]["merges"]]
    found = []
    for number, form in enumerate((merges, [" ".join(pair) for pair in merges], [merges[5], *merges])):
        content["model"]["merges"] = form
        found.append(vocabulary(tmp_path / str(number), 1200, tokenizer_json=content).byte_level.merges)
    assert found[0] == found[1] == found[2] == [" ".join(pair) for pair in merges]
    content["model"]["vocab"] |= {"x y": 1100, "x ": 1101}  # no text has these letters
    content["model"]["merges"] = [*merges, ["x ", "y"]]
    assert vocabulary(tmp_path / "spaces", 1200, tokenizer_json=content).byte_level.merges == found[0]


def splitting(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps]}}


REFUSED = {
    "another expression": (splitting(split("[a-z]+"), byte_level()), r"splits at '\[a-z\]\+'"),
    "a text to split at": (
        splitting(split("a") | {"pattern": {"String": " "}}, byte_level()),
        "splits at {'String': ' '}",
    ),
    "what is removed": (
        splitting(split("a") | {"behavior": "Removed"}, byte_level()),
        "Split is 'Removed', invert False",
    ),
    "another step": (splitting({"type": "Punctuation"}, byte_level()), "has the step 'Punctuation'"),
    "another order": (splitting(byte_level(), split("a")), "'ByteLevel' . 'Split'"),
    "a space before": ({"pre_tokenizer": byte_level(True, prefix=True)}, "add_prefix_space"),
    "no expression": ({"pre_tokenizer": byte_level()}, "splits at ''"),
    "another normalizer": ({"normalizer": {"type": "NFKC"}}, "normalizer is 'NFKC'"),
    "another decoder": ({"decoder": {"type": "BPEDecoder", "suffix": "x"}}, "decoder is 'BPEDecoder'"),
    "another post-processor": ({"post_processor": {"type": "Roberta"}}, "post-processor is 'Roberta'"),
    "another model": ({"model": {"type": "Unigram", "vocab": {}}}, "model is 'Unigram', not BPE"),
    "dropout": ({"dropout": 0.1}, "model.dropout is 0.1"),
    "merges of text": ({"merges": "a b"}, "merges is 'a b'; it must be a list"),
    "a merge of three": ({"merges": ["a b c"]}, "merge 0 is 'a b c'"),
    "a merge of what is no token": ({"merges": [["a", "qqqq"]]}, "merge 0 needs 'qqqq', which is no token"),
    "a merge into what is no token": ({"merges": [["q", "~"]]}, "merge 0 needs 'q~', which is no token"),
    "millions of merges": ({"merges": ["q u"] * ((1 << 20) + 1)}, "1048577 merges"),
}


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_a_part_that_a_gguf_cannot_carry_is_refused_by_name(tmp_path, change, message):
    content = saved(trained("gpt-2", SPECIAL))
    for key, value in change.items():
        (content if key in content else content["model"])[key] = value
    with pytest.raises(CheckpointError, match=message) as raised:
        vocabulary(tmp_path, 1200, tokenizer_json=content)
    assert len(str(raised.value).splitlines()) == 1


def test_a_space_before_each_text_is_refused_by_the_configurations_name(tmp_path):
    configuration = CONFIGURATION | {"add_prefix_space": True}
    with pytest.raises(CheckpointError, match="add_prefix_space true"):
        folder_of(tmp_path, trained("gpt-2", SPECIAL), configuration=configuration)


def test_a_tokenizer_model_beside_it_is_not_read(tmp_path):
    """Llama 3's folders hold a `tokenizer.model` of tiktoken."""
    oracle = trained("dbrx", SPECIAL)
    vocab = vocabulary(tmp_path, 1200, tokenizer_json=saved(oracle), tokenizer_model=b"IQ== 0\n")
    assert vocab.byte_level.pre == "dbrx"
