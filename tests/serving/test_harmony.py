"""Answers in harmony: of every form, cut into pieces in every way, the parts are the same."""

from __future__ import annotations

import random

import pytest

from fiddler.sampling.constraint import Constraint
from fiddler.serving.harmony_answers import HarmonyParser
from fiddler.serving.tool_formats import tool_format
from fiddler.text.harmony import HarmonyMessages
from oracles.answer_cuts import cuts, parts

ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
NESTED = '{"a": {"b": ["}", "{\\"", "\u00e9"]}, "c": 1}'
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}


def harmony(begun=False, split_reasoning=True, tools=True):
    return HarmonyParser(begun=begun, split_reasoning=split_reasoning, tools=tools)


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (f"{ANALYSIS}Hm. 2 < 3.{NEXT}{FINAL}Yes.\n", "Hm. 2 < 3.", "Yes.\n", []),
        (f"{ANALYSIS}Hm.{NEXT}{FINAL}Yes.<|return|>", "Hm.", "Yes.", []),
        (f"{FINAL}Yes.", "", "Yes.", []),
        (f"{ANALYSIS}One.{NEXT}{ANALYSIS}Two.{NEXT}{FINAL}A{NEXT}{FINAL}B", "One.\n\nTwo.", "A\n\nB", []),
        (f"{ANALYSIS}cut of", "cut of", "", []),
        (
            f"{ANALYSIS}Call.{NEXT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{NESTED}<|call|>",
            "Call.",
            "",
            [("f", NESTED)],
        ),
        (f" to=functions.f<|channel|>commentary json<|message|>{NESTED}", "", "", [("f", NESTED)]),
        (
            f"{ANALYSIS}Call.{NEXT} to=functions.get_it<|channel|>analysis <|constrain|>json<|message|>{{}}",
            "Call.",
            "",
            [("get_it", "{}")],
        ),
        (
            f"<|channel|>commentary<|message|>First this.{NEXT}<|channel|>commentary to=functions.f<|message|>{{}}"
            f"{NEXT}<|channel|>commentary to=python<|message|>1+1",
            "",
            "First this.",
            [("f", "{}"), ("python", "1+1")],
        ),
        ("Just text.", "", "Just text.", []),
        ("to be < or <|not", "", "to be < or <|not", []),
        ("to=x is no header", "", "to=x is no header", []),
        ("Text<|end|>", "", "Text", []),
        (f"{ANALYSIS}a<|start|>assistant{FINAL}b", "a", "b", []),
        (f"{ANALYSIS}a<|end|>  b", "a", "  b", []),
        (f"{ANALYSIS}a{NEXT}", "a", "", []),
        (f"{ANALYSIS}a{NEXT}<|channel|>fin", "a", "", []),
        ("", "", "", []),
    ],
)
def test_messages_are_found_however_their_text_is_cut(text, reasoning, content, calls):
    for pieces in cuts(text):
        assert parts(harmony(), pieces) == (reasoning, content, calls)


def test_an_answer_that_is_begun_continues_its_content():
    for pieces in cuts(f" more.{NEXT}{FINAL}Then."):
        assert parts(harmony(begun=True), pieces) == ("", " more.\n\nThen.", [])


def test_reasoning_and_calls_that_nobody_asked_for_are_content():
    text = f"{ANALYSIS}Hm.{NEXT}<|channel|>commentary to=functions.f<|message|>{{}}"
    assert parts(harmony(split_reasoning=False, tools=False), [text]) == ("", "Hm.\n\nf{}", [])
    parser = harmony()
    parts(parser, [text])
    assert parser.calls == 1


def test_random_marks_give_the_same_parts_in_pieces_as_whole():
    chance = random.Random(1)
    letters = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "to=", "functions.f", "final"]
    letters += [" ", "analysis", "assistant", "<|", "x", "<"]
    for _ in range(5000):
        pieces = chance.choices(letters, k=chance.randint(1, 14))
        whole, cut = HarmonyMessages(), HarmonyMessages()
        expected = joined(whole.push("".join(pieces)) + whole.finish())
        assert joined([part for piece in pieces for part in cut.push(piece)] + cut.finish()) == expected, pieces


def joined(found):
    """The parts with each message's text in one."""
    together = []
    for kind, text, new in found:
        if together and together[-1][0] == kind and not new:
            together[-1] = (kind, together[-1][1] + text)
        else:
            together.append((kind, text))
    return together


def test_the_grammar_of_a_call_is_one_that_the_parser_reads():
    form = tool_format("...<|start|>assistant<|channel|>final<|message|>...")
    grammar = form.grammar([TOOL], {}, thinking=False)
    assert "<|channel|>commentary to=functions." in grammar
    Constraint.grammar(grammar)
    ids = {"<|channel|>": 7, "<|constrain|>": 8, "<|message|>": 9}
    assert '<[7]> "commentary to=functions." call' in form.grammar([TOOL], ids, thinking=False)
    assert '"f " <[8]> "json" <[9]>' in form.grammar([TOOL], ids, thinking=False)
