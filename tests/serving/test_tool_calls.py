"""Reasoning and tool calls in answers: of each syntax, cut into pieces in every way, the parts are the same."""

from __future__ import annotations

import json
import random

import pytest

from fiddler.serving.answer_parts import AnswerParser, ReasoningParser
from fiddler.serving.tool_calls import BareObjectParser, DeepSeekParser, HermesParser, MistralParser
from fiddler.serving.tool_formats import tool_format
from oracles.answer_cuts import cuts, parts

ALL, ALL_END = "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"
BEGIN, SEP, END = (f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call\u2581begin", "sep", "call\u2581end"))
NESTED = '{"a": {"b": ["}", "{\\"", "\u00e9"]}, "c": 1}'


def bare():
    return BareObjectParser(["f"])


@pytest.mark.parametrize(
    "parser, text, content, calls",
    [
        (HermesParser, "Just text.", "Just text.", []),
        (HermesParser, f'<tool_call>\n{{"name": "f", "arguments": {NESTED}}}\n</tool_call>', "", [("f", NESTED)]),
        (
            HermesParser,
            'Let me see.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>\n'
            '{"name":"g","arguments":{"x":1}}\n</tool_call>',
            "Let me see.",
            [("f", "{}"), ("g", '{"x":1}')],
        ),
        (HermesParser, '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
        (HermesParser, '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
        (HermesParser, '<tool_call>{"name": "f", "arguments": {"x": ', "", [("f", '{"x": ')]),
        (HermesParser, "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
        (HermesParser, "a < b and <tool", "a < b and <tool", []),
        (HermesParser, "1 <tool_calm> 2", "1 <tool_calm> 2", []),
        (MistralParser, f'[TOOL_CALLS][{{"name": "f", "arguments": {NESTED}}}]', "", [("f", NESTED)]),
        (
            MistralParser,
            'Sure. [TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": [1]}, "id": "abc"}]',
            "Sure.",
            [("f", "{}"), ("g", '{"x": [1]}')],
        ),
        (MistralParser, f"[TOOL_CALLS]f[ARGS]{NESTED}[TOOL_CALLS]g[ARGS]{{}}", "", [("f", NESTED), ("g", "{}")]),
        (MistralParser, "[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}", "", [("f", "{}")]),
        (MistralParser, "[TOOL", "[TOOL", []),
        (MistralParser, "[1, 2]", "[1, 2]", []),
        (
            DeepSeekParser,
            f"Now. {ALL}{BEGIN}function{SEP}f\n```json\n{NESTED}\n```{END}"
            f"{BEGIN}function{SEP}g\n```json\n{{}}\n```{END}{ALL_END}",
            "Now.",
            [("f", NESTED), ("g", "{}")],
        ),
        (
            DeepSeekParser,
            f"{ALL}{BEGIN}f{SEP}{NESTED}{END}{BEGIN}g{SEP}{{}}{END}{ALL_END}",
            "",
            [("f", NESTED), ("g", "{}")],
        ),
        (DeepSeekParser, "no call", "no call", []),
        (
            bare,
            f'{{"name": "f", "parameters": {NESTED}}}',
            "",
            [("f", json.dumps(json.loads(NESTED), ensure_ascii=False))],
        ),
        (bare, '{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        (bare, "{not JSON", "{not JSON", []),
        (bare, "text", "text", []),
    ],
)
def test_calls_are_found_however_their_text_is_cut(parser, text, content, calls):
    for pieces in cuts(text):
        assert parts(parser(), pieces) == ("", content, calls)


@pytest.mark.parametrize(
    "thinking, text, reasoning, content",
    [
        (False, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", "Hm.\n\nSo.", "Yes."),
        (True, "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        (True, "never ends", "never ends", ""),
        (False, "Yes.", "", "Yes."),
        (False, "  <thin ice", "", "  <thin ice"),
        (False, "1 <think> 2 </think>", "", "1 <think> 2 </think>"),
        (False, "<think></think>Yes.", "", "Yes."),
        (True, "a </thin> b </think>c", "a </thin> b", "c"),
    ],
)
def test_reasoning_is_split_from_content_however_the_text_is_cut(thinking, text, reasoning, content):
    for pieces in cuts(text):
        assert parts(AnswerParser(ReasoningParser(thinking)), pieces) == (reasoning, content, [])


def test_a_call_after_reasoning_is_found_and_one_within_it_is_not():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for pieces in cuts(f"<think>maybe {call}</think>\n{call}"):
        parser = AnswerParser(ReasoningParser(False), HermesParser())
        assert parts(parser, pieces) == (f"maybe {call}", "", [("f", "{}")])
        assert parser.calls == 1


def test_random_text_is_never_lost_and_a_call_s_name_comes_once():
    """Letters of the markers in any order: whatever is no call is content, but for white space around calls."""
    chance = random.Random(1)
    letters = ["<tool_call>", "</tool_call>", "{", "}", '"', "name", ":", " ", "x", "\\", ",", "arguments"]
    for _ in range(3000):
        pieces = chance.choices(letters, k=chance.randint(1, 14))
        whole = parts(HermesParser(), ["".join(pieces)])
        assert parts(HermesParser(), pieces) == whole
        if not whole[2]:
            assert "".join(whole[1].split()) == "".join("".join(pieces).split())


@pytest.mark.parametrize(
    "template, name",
    [
        (None, "object"),
        ("{{ messages }}", "object"),
        ("...<tool_call>...", "hermes"),
        ("...<tool_call>...<function=f>", "object"),
        ("...[TOOL_CALLS]...", "mistral"),
        (f"...{BEGIN}...", "deepseek"),
        ("...<|start|>assistant<|channel|>final<|message|>...", "harmony"),
    ],
)
def test_the_syntax_is_found_in_the_template(template, name):
    assert tool_format(template).name == name
