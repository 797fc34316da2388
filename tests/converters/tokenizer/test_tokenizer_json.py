"""`tokenizer.json` of small vocabularies: it gives the `tokenizers` library's ids, or it is refused."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer as FastTokenizer, pre_tokenizers

from fiddler.converters.tokenizer.merges import scores_from_merges
from fiddler.errors import CheckpointError
from fiddler.text.tokenizer import Tokenizer
from oracles.texts import texts
from oracles.vocabularies import (
    BYTES,
    CONTROL,
    NORMAL,
    SMALL,
    USER,
    bpe,
    differing,
    saved,
    sentencepiece_model,
    vocabulary,
)

STRINGS = [*(f"{a}{b}{c}{d}" for a in "ab " for b in "abc" for c in "abc " for d in "ab "), *texts()[:300]]
LETTERS = ["▁", "a", "b", "c"]


def changed(content, path, value):
    """A copy of `content` with the value at `path` (keys joined by dots) replaced."""
    copy = json.loads(json.dumps(content))
    *inner, last = path.split(".")
    parent = copy
    for key in inner:
        parent = parent[int(key) if isinstance(parent, list) else key]
    parent[last] = value
    return copy


# --- merges -------------------------------------------------------------------------------------------------------

AGREE = {
    "the order decides": (["ab", "bc", "abc"], ["a b", "ab c", "b c"]),
    "every split is listed": (["ab", "bc", "abc"], ["b c", "a b", "ab c", "a bc"]),
    "the longer way round": (["ab", "bc", "abc"], ["b c", "a bc", "a b"]),
    "a token never reached": (["ab", "abca"], ["a b"]),
    "runs": (["aa", "aaa", "aaaa"], ["a a", "aa a", "aa aa"]),
    "runs the other way": (["aa", "aaaa", "aaa"], ["a a", "aa aa", "a aa", "aa a"]),
    "listed twice": (["ab", "bc", "abc"], ["a b", "b c", "ab c", "a bc", "a b"]),
    "spaces": (["▁a", "▁▁", "▁▁a"], ["▁ a", "▁ ▁", "▁ ▁a"]),
}
DIFFER = {
    "no way to a token": (["ab"], []),
    "another pair comes first": (["ab", "bc", "abc"], ["b c", "a b", "ab c"]),
    "half of a run": (["aa", "aaa"], ["a a", "a aa"]),
    "a character that is no token": (["ad"], []),
}


@pytest.mark.parametrize("tokens, merges", AGREE.values(), ids=AGREE)
def test_merges_that_scores_can_express_give_the_librarys_ids(tmp_path, tokens, merges):
    oracle = bpe([*LETTERS, *tokens], [tuple(merge.split()) for merge in merges])
    assert (
        differing(vocabulary(tmp_path, 300, tokenizer_json=saved(oracle)), oracle, [*STRINGS, "aaaaaaa", "aabca ab"])
        == []
    )


@pytest.mark.parametrize("tokens, merges", DIFFER.values(), ids=DIFFER)
def test_merges_that_scores_cannot_express_are_refused_and_would_give_other_ids(tmp_path, tokens, merges):
    pairs = [tuple(merge.split()) for merge in merges]
    oracle = bpe([*LETTERS, *tokens], pairs)
    with pytest.raises(CheckpointError, match=r"never join.*is a token.*tokenizer.model beside it"):
        vocabulary(tmp_path, 300, tokenizer_json=saved(oracle))
    # SentencePiece with the same tokens, the best pair first, gives other ids to the token's own text.
    order = ["".join(pair) for pair in pairs]
    tokens = sorted(tokens, key=lambda token: order.index(token) if token in order else 99)
    pieces = [(token.encode(), NORMAL) for token in ("c", *tokens)]
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(*pieces))
    assert any(theirs.encode(token, out_type=str) != oracle.encode(token).tokens for token in tokens)


def naive(token, ranks):
    """The symbols of `token` and the last merge's rank: the best pair is searched anew for each merge."""
    symbols, rank = list(token), None
    while pairs := [(ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        rank, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols, rank


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_merges_by_a_heap_are_those_of_a_search_for_the_best_pair(data):
    parts, ranks = ["a", "b", "c"], {}
    for rank in range(data.draw(st.integers(0, 8))):
        pair = data.draw(st.sampled_from(parts)), data.draw(st.sampled_from(parts))
        ranks[pair] = rank
        parts.append("".join(pair))
    token = data.draw(st.text("abcd", min_size=1, max_size=14))
    symbols, rank = naive(token, ranks)
    if len(symbols) == 2:
        with pytest.raises(CheckpointError, match=f"join '{symbols[0]}' and '{symbols[1]}'"):
            scores_from_merges([token], ranks, source="x")
        return
    lowest = max(ranks.values(), default=0) + 1
    expected = -float(lowest if rank is None or len(symbols) > 1 else rank)
    assert scores_from_merges([token], ranks, source="x") == {token: expected}


def test_a_token_of_65_536_letters_takes_less_than_two_seconds():
    ranks = {("a" * 2**power, "a" * 2**power): power for power in range(16)}
    started = time.process_time()
    assert scores_from_merges(["a" * 2**16], ranks, source="x") == {"a" * 2**16: -15.0}
    assert time.process_time() - started < 2


def test_longer_tokens_and_more_characters_than_any_vocabulary_has_are_refused_before_merging(tmp_path):
    for tokens, says in (
        (["a" * 1_000_000], "1000000 characters long; at most 65536"),
        (["a" * length for length in range(65_000, 65_070)], "its tokens have 455.* characters; at most 4194304"),
    ):
        oracle = changed(saved(SMALL), "model.vocab", json.loads(SMALL.to_str())["model"]["vocab"])
        oracle["model"]["vocab"] |= {token: 300 + index for index, token in enumerate(tokens)}
        started = time.process_time()
        with pytest.raises(CheckpointError, match=says):
            vocabulary(tmp_path, 300, tokenizer_json=oracle)
        assert time.process_time() - started < 3


def test_the_score_of_a_token_is_the_negative_rank_of_its_last_merge():
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("ab", "c"): 2, ("a", "bc"): 3}
    scores = scores_from_merges(["a", "ab", "bc", "abc", "cca"], ranks, source="x")
    assert scores == {"a": -4, "ab": -1, "bc": 0, "abc": -3, "cca": -4}  # "a" and "cca" come from no merge


@settings(deadline=None)
@given(st.data())
def test_random_merges_give_the_librarys_ids_if_they_are_accepted(tmp_path_factory, data):
    words = st.text("ab▁", min_size=2, max_size=4)
    tokens = data.draw(st.lists(words, unique=True, max_size=6))
    known = {"a", "b", "▁", *tokens}
    pairs = [(word[:cut], word[cut:]) for word in tokens for cut in range(1, len(word))]
    merges = data.draw(st.permutations([pair for pair in pairs if set(pair) <= known]))
    merges = merges[: data.draw(st.integers(0, len(merges)))]
    oracle = bpe(["▁", "a", "b", *tokens], merges)
    folder = tmp_path_factory.mktemp("any")
    try:
        vocab = vocabulary(folder, 300, tokenizer_json=saved(oracle))
    except CheckpointError:
        return
    strings = data.draw(st.lists(st.text("ab ", max_size=12), min_size=5))
    assert differing(vocab, oracle, [*strings, *(token.replace("▁", " ") for token in tokens)]) == []


@pytest.mark.parametrize("pairs", [False, True])
def test_merges_are_read_as_strings_and_as_pairs(tmp_path, pairs):
    content = saved(SMALL)
    content["model"]["merges"] = [["▁", "a"], ["a", "b"]] if pairs else ["▁ a", "a b"]
    assert differing(vocabulary(tmp_path, 300, tokenizer_json=content), SMALL, STRINGS) == []


def test_ignore_merges_is_accepted_only_if_merges_build_every_token(tmp_path):
    whole = bpe([*LETTERS, "▁a", "ab"], [("▁", "a"), ("a", "b")], ignore_merges=True)
    assert differing(vocabulary(tmp_path, 300, tokenizer_json=saved(whole)), whole, STRINGS) == []
    dead = bpe([*LETTERS, "▁a", "▁abc"], [("▁", "a")], ignore_merges=True)
    with pytest.raises(CheckpointError, match="ignore_merges"):
        vocabulary(tmp_path, 300, tokenizer_json=saved(dead))


def test_splitting_at_spaces_is_accepted_only_if_tokens_have_spaces_at_their_start_alone(tmp_path):
    for tokens, accepted in ((["▁a"], True), (["▁a", "▁▁"], False), (["▁a", "a▁"], False)):
        oracle = bpe([*LETTERS, *tokens], [tuple(token) for token in tokens])
        oracle.normalizer, oracle.pre_tokenizer = None, pre_tokenizers.Metaspace(split=True)
        oracle = FastTokenizer.from_str(json.dumps(changed(saved(oracle), "normalizer", None)))
        if accepted:
            assert differing(vocabulary(tmp_path, 300, tokenizer_json=saved(oracle)), oracle, STRINGS) == []
        else:
            with pytest.raises(CheckpointError, match="splits text at spaces"):
                vocabulary(tmp_path, 300, tokenizer_json=saved(oracle))


# --- added tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [None, "always", "first", "never"])
def test_added_tokens_are_matched_as_in_the_library(tmp_path, scheme):
    oracle = bpe([*LETTERS, "▁a", "ab"], [("▁", "a"), ("a", "b")])
    if scheme:
        content = changed(saved(oracle), "normalizer", None)
        oracle = FastTokenizer.from_str(json.dumps(content))
        oracle.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    oracle.add_special_tokens(["<x>"])
    oracle.add_tokens([AddedToken(text, normalized=False) for text in ("<u>", "<u>>", "[ab]", "  c")])
    vocab = vocabulary(tmp_path, 280, tokenizer_json=saved(oracle))
    assert vocab.tokens[265:271] == ("<x>", "<u>", "<u>>", "[ab]", "  c", "[PAD270]")
    assert vocab.types[265:270] == (CONTROL, USER, USER, USER, USER)
    marked = [
        f"{a}{token}{b}"
        for token in ("<u>", "<u>>", "[ab]", "<x>", "<s>", "  c")
        for a in STRINGS[:40]
        for b in STRINGS[:9]
    ]
    assert differing(vocab, oracle, marked) == []
    ours = Tokenizer.from_metadata(vocab.metadata())
    assert 266 in ours.encode("a<u>")
    assert 265 not in ours.encode("a<x>")


@pytest.mark.parametrize("options", [["single_word"], ["lstrip"], ["rstrip"], ["lstrip", "rstrip", "single_word"]])
@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_that_take_blanks_along_or_match_whole_words_give_the_librarys_ids(tmp_path, options, special):
    oracle = FastTokenizer.from_str(SMALL.to_str())
    added = AddedToken("<u>", normalized=False, special=special, **dict.fromkeys(options, True))
    (oracle.add_special_tokens if special else oracle.add_tokens)([added, AddedToken("bc", normalized=False)])
    vocab = vocabulary(tmp_path, 300, tokenizer_json=saved(oracle))
    blanks = ("", " ", "  ", "\n\u3000", "a", "\u00a0b", "_")
    marked = [
        f"{a}{b}<u>{c}{d}" for a in ("", "<u>", "a") for b in blanks for c in blanks for d in ("", "ab", " bc<u>")
    ]
    assert differing(vocab, oracle, marked) == []


def test_an_added_token_in_the_normalised_text_is_refused_unless_it_is_special(tmp_path):
    oracle = FastTokenizer.from_str(SMALL.to_str())
    oracle.add_tokens([AddedToken("<u>", normalized=True)])
    with pytest.raises(CheckpointError, match="added token '<u>' sets normalized"):
        vocabulary(tmp_path, 300, tokenizer_json=saved(oracle))
    oracle = FastTokenizer.from_str(SMALL.to_str())
    oracle.add_special_tokens([AddedToken("<u>", normalized=True)])
    assert vocabulary(tmp_path, 300, tokenizer_json=saved(oracle)).types[265] == CONTROL


# --- refusals -----------------------------------------------------------------------------------------------------

METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
REFUSED = {
    "unigram": ("model.type", "Unigram", "model is 'Unigram', not BPE"),
    "wordpiece": ("model.type", "WordPiece", "model is 'WordPiece', not BPE"),
    "no bytes": ("model.byte_fallback", False, "byte_fallback is not true"),
    "dropout": ("model.dropout", 0.1, "dropout is 0.1"),
    "prefix": ("model.continuing_subword_prefix", "##", "continuing_subword_prefix is '##'"),
    "suffix": ("model.end_of_word_suffix", "</w>", "end_of_word_suffix is '</w>'"),
    "nothing done to spaces": ("normalizer", None, "pre-tokenizer is missing"),
    "unicode": ("normalizer", {"type": "NFKC"}, "normalizer is 'NFKC'"),
    "unicode, too": (
        "normalizer.normalizers",
        [{"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}],
        "'NFC' . 'Prepend'",
    ),
    "another mark": ("normalizer.normalizers", [{"type": "Prepend", "prepend": "_"}], "normalizer is 'Prepend'"),
    "both ways": ("pre_tokenizer", METASPACE, "normalizer is 'Prepend' . 'Replace', its pre-tokenizer 'Metaspace'"),
    "bytes as letters": ("pre_tokenizer", {"type": "ByteLevel"}, "which byte-level BPE in a GGUF cannot follow"),
    "normalizer is text": ("normalizer", "NFC", "normalizer is 'NFC'"),
    "no model": ("model", None, "model is None"),
    "no vocabulary": ("model.vocab", ["a"], "vocab is "),
    "an id of text": ("model.vocab.a", "5", "'a' has the id '5'"),
    "a negative id": ("model.vocab.a", -1, "'a' has the id -1"),
    "a huge id": ("model.vocab.a", 10**30, "'a' has the id 1000"),
    "an id for two": ("model.vocab.a", 261, "both have id 261"),
    "no merges": ("model.merges", None, "merges is None"),
    "half a merge": ("model.merges", ["a"], "merge 0 is 'a'"),
    "a merge of three": ("model.merges", [["a", "b", "c"]], "it must be two tokens"),
    "a merge of numbers": ("model.merges", [[1, 2]], "it must be two tokens"),
    "a merge to nothing": ("model.merges", [["b", "a"]], "needs 'ba', which is no token"),
    "added tokens of text": ("added_tokens", "x", "added_tokens is 'x'"),
    "an added token of text": ("added_tokens", ["x"], "it must be an id and a token"),
    "an added token without id": ("added_tokens", [{"content": "x"}], "it must be an id and a token"),
    "an added token without text": ("added_tokens", [{"id": 300, "content": ""}], "it must be an id and a token"),
    "an added token far off": ("added_tokens", [{"id": 1 << 40, "content": "x"}], "it must be an id and a token"),
    "an added token elsewhere": ("added_tokens", [{"id": 260, "content": "x"}], "claims its id"),
}


@pytest.mark.parametrize("path, value, message", REFUSED.values(), ids=REFUSED)
def test_errors_name_the_refused_value(tmp_path, path, value, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        vocabulary(tmp_path, 300, tokenizer_json=changed(saved(SMALL), path, value))
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_merges_with_byte_or_unknown_tokens_are_refused(tmp_path):
    for left, right in (("<0x0A", ">"), ("<0x0A>", "a"), ("<un", "k>")):
        tokens = dict.fromkeys([*LETTERS, left, right, left + right])
        oracle = bpe([token for token in tokens if token not in (*BYTES, "<unk>")], [(left, right)])
        with pytest.raises(CheckpointError, match="merge 0 has to do with"):
            vocabulary(tmp_path, 300, tokenizer_json=changed(saved(oracle), "added_tokens", []))


def test_merges_with_an_added_token_are_accepted_unless_it_sets_options(tmp_path):
    oracle = bpe([*LETTERS, "<unk>a"], [("<unk>", "a")])
    assert differing(vocabulary(tmp_path, 300, tokenizer_json=saved(oracle)), oracle, [*STRINGS, "<unk>a"]) == []
    content = changed(saved(oracle), "added_tokens.0.single_word", True)
    with pytest.raises(CheckpointError, match="merge 0 has to do with"):
        vocabulary(tmp_path, 300, tokenizer_json=content)


def test_a_vocabulary_that_lacks_a_byte_token_is_refused(tmp_path):
    content = saved(SMALL)
    del content["model"]["vocab"]["<0x41>"]
    with pytest.raises(CheckpointError, match="lacks 1 byte tokens, <0x41>"):
        vocabulary(tmp_path, 300, tokenizer_json=content)


@pytest.mark.parametrize("metaspace", [{"replacement": "_"}, {"prepend_scheme": "last"}, {"type": "Split"}])
def test_other_pre_tokenizers_are_refused(tmp_path, metaspace):
    content = changed(changed(saved(SMALL), "normalizer", None), "pre_tokenizer", METASPACE | metaspace)
    with pytest.raises(CheckpointError, match=r"its (Metaspace|pre-tokenizer)"):
        vocabulary(tmp_path, 300, tokenizer_json=content)


def test_the_oldest_form_of_metaspace_is_read(tmp_path):
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "split": False}
    nested = {"type": "Sequence", "pretokenizers": [older]}
    vocab = vocabulary(
        tmp_path, 300, tokenizer_json=changed(changed(saved(SMALL), "normalizer", None), "pre_tokenizer", nested)
    )
    assert (vocab.add_space_prefix, vocab.prepend_scheme) == (False, None)
