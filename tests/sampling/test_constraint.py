"""Constrained output: masks against trying every token, JSON against `jsonschema`, grammars against regular expressions
and Python's parser.
"""

from __future__ import annotations

import ast
import json
import math
import random
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

import fiddler
from fiddler import Constraint, Sampling
from fiddler.errors import RequestError
from fiddler.generation.request import Request
from fiddler.sampling.constraint import Vocabulary
from fiddler.text.tokenizer import Tokenizer
from oracles.byte_level import keys_of
from oracles.texts import REAL_MODEL
from oracles.vocabularies import BYTE, CONTROL, LETTERS, NORMAL, USER, small, vocabulary
from tools.schemas import hold

GREEDY = Sampling(0.0)
SCHEMAS = 200


@pytest.fixture(scope="module")
def engine():
    return fiddler.load(threads=1)  # so small a model is no faster with more


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    found = vocabulary(folder, tokenizer_model=REAL_MODEL.read_bytes())
    return Tokenizer.from_metadata(found.metadata())


def test_json_for_random_schemas_is_valid(engine):
    """`hold` asserts it of every finished answer; few are cut at the token limit."""
    cut = [seed for seed in range(SCHEMAS) if hold(engine, seed).finish_reason == "length"]
    assert len(cut) <= 0.05 * SCHEMAS


def test_white_space_between_json_tokens_is_limited(engine):
    """As llama.cpp's grammars have it: at most a blank, or two line breaks and 20 blanks."""
    blanks = [token for token, piece in enumerate(engine.tokenizer.pieces()) if piece and not piece.strip(b" \t\n")]
    schema = {"type": "array", "items": {"enum": ["a b"]}, "minItems": 2, "maxItems": 2}
    sampling = Sampling(0.0, logit_bias=dict.fromkeys(blanks, 1e5))
    done = engine.generate("x", sampling, 200, constraint=Constraint.json_schema(schema))
    assert done.finish_reason == "stop"
    assert json.loads(done.text) == ["a b"] * 2
    assert re.fullmatch(r'\[(\s{1,22}"a b"\s{1,22}.){2}', done.text, re.DOTALL)


def literal(text):
    return 'root ::= "' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


BYTE_LEVEL = Tokenizer.from_metadata(keys_of("qwen2", ("red", USER), ("<|im_end|>", CONTROL), eos_token_id=801))
TEXTS = [
    "red",
    "reed",
    "red apple",
    " red",
    "▁▁x",
    "日本 語",
    "é\n\tè",
    "\0\x7f",
    "<s></s>",
    "<0x41>[INST]",
    '"\\"',
    "  ",
]


def check_masks(tokenizer, tokens, texts, rng):
    """Walk through texts by random allowed tokens; at every step the mask is what trying every token gives.

    Where only one text remains, the library allows one way to tokenize it, the tokenizer's own or another.
    """
    pieces, encoded, output = tokenizer.pieces(), [text.encode() for text in texts], b""
    tokens_of = defaultdict(set)
    for token, piece in enumerate(pieces):
        tokens_of[piece].add(token)
    alternatives = " | ".join(literal(text).removeprefix("root ::= ") for text in texts)
    guide = tokens.guide(Constraint.grammar(f"root ::= {alternatives}"))
    while True:
        remaining = [text[len(output) :] for text in encoded if text.startswith(output)]
        expected = {token for rest in remaining for n in range(len(rest)) for token in tokens_of[rest[: n + 1]]}
        allowed = set(np.flatnonzero(guide.allowed()).tolist())
        assert guide.finished == (remaining == [b""])
        assert (allowed & tokenizer.end_ids) == (tokenizer.end_ids if b"" in remaining else set())
        allowed -= tokenizer.end_ids
        assert allowed <= expected
        assert allowed == expected or (len(allowed) == 1 and b"" not in remaining)
        if not allowed:
            return output
        token = rng.choice(sorted(allowed))
        guide.advance(token)
        output += pieces[token]


def test_masks_are_what_trying_every_token_gives(engine, mixtral):
    rng = random.Random(5)
    odd = small(*LETTERS, ("red", 0, USER), ("▁red", -1, NORMAL), ("<|im_end|>", 0, CONTROL), add_space_prefix=True)
    assert BYTE in odd["tokenizer.ggml.token_type"]
    for tokenizer in (engine.tokenizer, mixtral, Tokenizer.from_metadata(odd), BYTE_LEVEL):
        tokens = Vocabulary(tokenizer)
        outputs = {check_masks(tokenizer, tokens, TEXTS, rng) for _ in range(25)}
        assert len(outputs) > 3
        for text in TEXTS:
            assert check_masks(tokenizer, tokens, [text], rng) == text.encode()


def test_the_only_possible_text_gets_the_tokenizers_own_ids(engine, mixtral):
    """Without the space prefix of a text; byte tokens only for text that the vocabulary cannot write otherwise."""
    for tokenizer in (engine.tokenizer, mixtral, BYTE_LEVEL):
        for text in (" the red apple", "red apple", '{"name":'):
            guide, tokens = Vocabulary(tokenizer).guide(Constraint.grammar(literal(text))), []
            while not guide.finished:
                tokens.append(int(guide.allowed().argmax()))
                guide.advance(tokens[-1])
            assert tokens == tokenizer.encode(text, continuing=True)


@pytest.mark.parametrize(
    "part, expected",
    [
        ("[&&a~~b+--]", set("&a~b+,-")),
        (".", {chr(code) for code in range(128)}),
        ("[^a]", {chr(code) for code in range(128)} - {"a"}),
        (r"[^\x00-\x20\u0041-\U0000005A]", {chr(code) for code in range(0x21, 128)} - {*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"}),
        (r"[\]\[\\\"^\n/-]", set('][\\"^\n/-')),
        ('"&&" # [a]', {"&"}),
        ('"." | "--"', set(".-")),
        ('"\x7f"', {"\x7f"}),
    ],
)
def test_gbnf_characters_and_classes_mean_what_they_mean_in_llama_cpp(engine, part, expected):
    """The mask of the first token shows which ASCII characters may come first."""
    guide = Vocabulary(engine.tokenizer).guide(Constraint.grammar(f'root ::= {part} "x"'))
    allowed = guide.allowed()
    pieces = [engine.tokenizer.pieces()[token] for token in np.flatnonzero(allowed)]
    assert {chr(piece[0]) for piece in pieces if piece and piece[0] < 128} == expected


def test_a_mask_allows_no_token_without_text_but_end_tokens(mixtral):
    guide = Vocabulary(mixtral).guide(Constraint.grammar("root ::= .*"))
    textless = [token for token, piece in enumerate(mixtral.pieces()) if not piece and token not in mixtral.end_ids]
    assert {mixtral.bos_id, 0} <= {*textless}
    assert not guide.allowed()[textless].any()
    assert guide.allowed()[sorted(mixtral.end_ids)].all()


def is_sum(text):
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Constant)
    return all(isinstance(node, allowed) for node in ast.walk(ast.parse(text, mode="eval")))


DATE = r"""
# a moment, as people write it
root     ::= day "-" month "-" year " "? time?
day      ::= "0" [1-9] | [12] [0-9] |
             "3" [01]
month    ::= "0" [1-9] | "1" [0-2]
year     ::= [0-9]{4}
time     ::= [0-9]{2} (":" [0-9]{2}){1,2} ("\x41" | "\u0050") "M"
"""
LIST = 'root ::= item{2,3}\nitem ::= "- " [^\\n\\x00-\\x1f]{1,20} "\\n"  # to the end of the line'
NESTED = 'root ::= sum\nsum ::= term ([-+*] term){0,2}\nterm ::= num | "(" sum ")"\nnum ::= [1-9] [0-9]{0,2}'
ODD = r'root ::= "\u00e9" [&&a~~b+--]{2} [\u4e00-\u4e0f]+ "\U0001F600" . [^\x00-\x7f]? "\"\\"'
GRAMMARS = {
    "date": (
        DATE,
        re.compile(r"(0[1-9]|[12]\d|3[01])-(0[1-9]|1[0-2])-\d{4} ?(\d\d(:\d\d){1,2}(A|P)M)?", re.ASCII).fullmatch,
    ),
    "list": (LIST, re.compile(r"(- [^\x00-\x1f]{1,20}\n){2,3}").fullmatch),
    "nested": (NESTED, is_sum),
    "odd": (ODD, re.compile(r'é[&a~b+,-]{2}[\u4e00-\u4e0f]+😀.[^\x00-\x7f]?"\\', re.DOTALL).fullmatch),
    "lark": ('start: NAME ("," NAME){1,2}\nNAME: /[a-z]{1,6}/', re.compile(r"[a-z]{1,6}(,[a-z]{1,6}){1,2}").fullmatch),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_finished_text_matches_its_grammar(engine, name):
    grammar, accepts = GRAMMARS[name]
    constraint, finished = Constraint.grammar(grammar), set()
    for seed in range(12):
        done = engine.generate("Once upon a time", Sampling(1.5, seed=seed), 60, constraint=constraint)
        if done.finish_reason == "stop":
            assert accepts(done.text), done.text
            finished.add(done.text)
    assert len(finished) >= 3


def test_a_constrained_generation_ends_where_its_grammar_ends(engine):
    fixed = Constraint.grammar('root ::= "a red boat" | "a red ball"')
    for ignore_eos in (False, True):
        done = engine.generate("Tom has", GREEDY, 30, constraint=fixed, ignore_eos=ignore_eos)
        assert (done.text, done.finish_reason) in [("a red boat", "stop"), ("a red ball", "stop")]
        assert not {*done.tokens} & engine.tokenizer.end_ids  # an end token is certain: no step is spent on it
        assert "".join(engine.stream("Tom has", GREEDY, 30, constraint=fixed, ignore_eos=ignore_eos)) == done.text
    cut = engine.generate("Tom has", GREEDY, len(done.tokens) - 1, constraint=fixed)
    assert (cut.tokens, cut.finish_reason) == (done.tokens[:-1], "length")
    assert engine.generate("Tom has", GREEDY, 30, constraint=fixed, stop=["red"]).text == "a "
    empty = engine.generate("Tom", GREEDY, 5, constraint=Constraint.grammar('root ::= ""'))
    assert (empty.text, empty.finish_reason) == ("", "stop")
    endless = engine.generate("1", GREEDY, 9, constraint=Constraint.grammar("root ::= [0-9]+"), ignore_eos=True)
    assert (len(endless.tokens), endless.finish_reason) == (9, "length")
    assert set(endless.text) <= set("0123456789")


def test_a_constrained_generation_iterated_again_gives_the_same_text(engine):
    generation = engine.start(
        Request("Tom", Sampling(1.0, seed=1), 30, constraint=Constraint.json_schema({"enum": [12, 345]}))
    )
    assert "".join(generation) == "".join(generation) in ("12", "345")


def test_log_probs_under_a_constraint_are_those_of_a_rescore_without_it(engine):
    """Those of the model without the constraint, and with end tokens although they are ignored."""
    exact = fiddler.load(precision="exact", threads=1)
    sampling = Sampling(0.9, seed=4, n_probs=3, logit_bias={300: 5.0}, presence_penalty=1.0)
    constraint = Constraint.json_schema({"type": "string", "maxLength": 20})
    done = exact.generate("Lily said", sampling, 40, constraint=constraint, ignore_eos=True)
    prompt = exact.tokenizer.encode("Lily said", add_bos=True)
    expected = torch.log_softmax(exact.logits([*prompt, *done.tokens])[len(prompt) - 1 : -1].double(), -1)
    assert [step.token for step in done.log_probs] == [*done.tokens]
    for step, row in zip(done.log_probs, expected, strict=True):
        assert step.logprob == pytest.approx(float(row[step.token]), abs=1e-4)
        top = row.topk(3)
        assert [value for _, value in step.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert min(np.diff(-top.values)) < 1e-4 or [token for token, _ in step.top] == top.indices.tolist()
    assert not exact.generate("Lily said", GREEDY, 2).log_probs


@pytest.mark.parametrize(
    "make, text, message",
    [
        (Constraint.json_schema, '{"type": "foo"}', "the JSON schema cannot be used: Invalid type: foo"),
        (Constraint.json_schema, "{", "the JSON schema cannot be read: Expecting property name"),
        (Constraint.json_schema, "[1]", "the JSON schema cannot be read: "),
        (Constraint.json_schema, "[" * 100_000, "the JSON schema cannot be read: "),
        (Constraint.json_schema, {"a": object()}, "the JSON schema cannot be read: .*not JSON serializable"),
        (Constraint.json_schema, {"minimum": 2, "maximum": 1, "type": "integer"}, "cannot be used: Unsatisfiable"),
        (Constraint.json_schema, {"type": "array", "uniqueItems": True}, "cannot be used: Unimplemented keys"),
        (Constraint.json_schema, {"$ref": "http://example.org/x"}, "the JSON schema cannot be used: "),
        (Constraint.grammar, 'root ::= "a', "the grammar cannot be read: .*Unexpected end of input at line 1"),
        (Constraint.grammar, 'root ::= "a" x', "the grammar cannot be read: .*Rule 'x' not found"),
        (Constraint.grammar, 'x ::= "a"', "the grammar cannot be read: .*No 'root' rule found"),
        (Constraint.grammar, 'root ::= "\\ud800"', r"the grammar cannot be read: \\ud800 is no character"),
        (Constraint.grammar, "root ::= <think>", "the grammar cannot be read: "),
        (Constraint.grammar, 'start: "a', "the grammar cannot be used: .*lexer error"),
        (Constraint.grammar, "", "the grammar cannot be used: Empty grammar"),
    ],
)
def test_an_unusable_schema_or_grammar_is_refused_in_one_line(make, text, message):
    with pytest.raises(RequestError, match=message) as refused:
        make(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_left_recursion_foreign_bias_tokens_and_banned_answers_are_errors(engine):
    with pytest.raises(RequestError, match="does a rule begin with itself"):
        engine.start(Request("Tom", constraint=Constraint.grammar('root ::= root "a"')))
    with pytest.raises(RequestError, match="logit_bias is for token 4096, outside the vocabulary of 4096"):
        engine.start(Request("Tom", Sampling(logit_bias={4096: 1.0})))
    token = engine.tokenizer.pieces().index(b"a")
    byte = engine.tokenizer.pieces().index(b"b")
    banned = Sampling(logit_bias=dict.fromkeys(range(4096), -math.inf) | {token: 0.0, byte: 0.0})
    with pytest.raises(RequestError, match="no token is left"):
        engine.generate("Tom", banned, 5, constraint=Constraint.grammar('root ::= "x"'))


def test_dry_breakers_are_found_in_the_text_of_the_engines_tokens(engine):
    """DRY ends a repeated run of tokens at once, unless a breaker, here across two tokens, is in it."""
    prompt = "One day, Tom saw a red ball. One day, Tom saw a red ball. One day, Tom saw a"
    repeated = engine.generate(prompt, GREEDY, 1)
    assert repeated.text == " red"
    dry = {"temperature": 0.0, "dry_multiplier": 50.0, "dry_penalty_last_n": -1}
    diverted = engine.generate(prompt, Sampling(**dry, dry_sequence_breakers=["never"]), 1)
    assert diverted.text != repeated.text
    broken = engine.generate(prompt, Sampling(**dry, dry_sequence_breakers=["never", "aw a"]), 1)
    assert broken.text == repeated.text


def test_without_llguidance_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['llguidance'] = None\n"  # makes an import of it fail
        "import fiddler\n"
        "try: fiddler.Constraint.json_schema({})\n"
        "except fiddler.FiddlerError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "constrained output needs the llguidance package: pip install 'fiddler-moe[constrain]'\n"
