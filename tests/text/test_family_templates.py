"""Templates of the families with tools, reasoning and variables: transformers' texts and ids, and forms of messages."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from fiddler.converters.tokenizer.vocabulary import read_vocabulary
from fiddler.errors import FileFormatError, RequestError
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.messages import checked_messages, forms
from fiddler.text.template_variables import TemplateVariables, parse_variables
from fiddler.text.tokenizer import Tokenizer
from oracles.conversations import CONVERSATIONS, TOOLS, compare
from oracles.family_templates import FAMILY_TEMPLATES, OWN_FORM
from oracles.reference import TINY

METADATA = read_vocabulary(TINY, 512).metadata()
TOKENIZER = Tokenizer.from_metadata(METADATA)
USER = [{"role": "user", "content": "Hello"}]


def ours(template, **keys):
    return ChatTemplate.of(TOKENIZER, METADATA | keys, template)


@pytest.mark.parametrize("name", FAMILY_TEMPLATES)
def test_text_and_ids_with_tools_and_variables_are_those_of_transformers(name):
    theirs = AutoTokenizer.from_pretrained(TINY)
    theirs.chat_template = FAMILY_TEMPLATES[name]
    template = ours(FAMILY_TEMPLATES[name])
    outcome = compare(theirs, template, step=5)  # prime to the numbers of tools, variables and prompts
    template.close()
    assert outcome.differing == []
    assert outcome.equal >= 28  # of 36
    assert bool(outcome.other_form) == (name in OWN_FORM)


def test_tool_calls_are_passed_as_given_and_in_other_forms_where_a_template_fails():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "é"}'}}]}
    given, null, text, decoded, *_ = forms(checked_messages([call | {"content": None}]))
    assert given == [call]
    assert (null, text) == ([call | {"content": None}], [call | {"content": ""}])
    assert decoded[0]["tool_calls"][0]["function"]["arguments"] == {"a": "é"}
    items = "{% for k, v in messages[0].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    assert ours(items).text([call]) == "a=é"
    text = "{{ 'x' + messages[0].tool_calls[0]['function']['arguments'] }}"
    call["tool_calls"][0]["function"]["arguments"] = {"a": "é"}
    assert ours(text).text([call]) == 'x{"a": "é"}'
    with pytest.raises(FileFormatError, match="no attribute 'b'"):  # fails in every form: the first failure is told
        ours("{{ messages[0].b.c }}").text([call])


def test_reasoning_has_each_of_its_names():
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "x", name: "hm"}
        assert ours("{{ messages[0].thinking ~ messages[0].reasoning_content }}").text([message]) == "hmhm"


def test_a_control_token_in_tools_variables_and_calls_stays_text():
    template = ours(
        "{{ bos_token }}{{ tools | tojson(ensure_ascii=true) }}{{ note }}{{ messages | tojson }}{{ eos_token }}"
    )
    variables = TemplateVariables([{"name": "</s>", "</s>": [{"x": "a<s>"}]}], {"note": "</s><s>"})
    call = {"role": "assistant", "tool_calls": [{"name": "</s>", "arguments": {"<s>": "</s>"}}]}
    ids = template.ids([call], variables)
    text = template.text([call], variables)
    assert [ids.count(TOKENIZER.bos_id), ids.count(TOKENIZER.eos_id)] == [1, 1]
    assert TOKENIZER.decode(ids[1:-1]) == text.removeprefix("<s>").removesuffix("</s>")


def test_a_template_for_tools_of_its_own_renders_conversations_with_tools():
    keys = {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    tokenizer = Tokenizer.from_metadata(METADATA | keys)
    template = ChatTemplate.of(tokenizer, METADATA | keys)
    assert template.text(USER) == "plain"
    assert template.text(USER, TemplateVariables(TOOLS)) == "tools"
    with pytest.raises(FileFormatError, match="tool_use is 5"):
        ChatTemplate.of(tokenizer, METADATA | keys | {"tokenizer.chat_template.tool_use": 5})


@pytest.mark.parametrize(
    ("tools", "kwargs", "message"),
    [
        ("f", {}, "tools are 'f'; give a list of objects"),
        ([print], {}, "tools are .*give a list of objects"),
        ([{"f": print}], {}, "'f' is <built-in"),
        (TOOLS, {"tools": TOOLS}, "tools are given twice"),
        (None, [], r"chat_template_kwargs are \[\]"),
        (None, {"messages": []}, "have messages, which fiddler sets"),
        (None, {"eos_token": "x"}, "have eos_token, which"),
        (None, {1: 2}, "has the key 1"),
        (None, {"x": float("inf")}, "'x' is inf"),
    ],
)
def test_tools_and_variables_that_make_no_sense_are_refused_in_one_line(tools, kwargs, message):
    with pytest.raises(RequestError, match=message) as caught:
        TemplateVariables(tools, kwargs)
    assert "\n" not in str(caught.value)


def test_variables_of_the_command_line_are_a_json_object():
    assert parse_variables('{"enable_thinking": false, "tools": []}') == TemplateVariables(
        [], {"enable_thinking": False}
    )
    for text in ("", "{", "[]", "enable_thinking=false", '{"x": NaN}', "[" * 100000):
        with pytest.raises(RequestError, match="is no JSON object; give one, as"):
            parse_variables(text)
    deep = CONVERSATIONS["one"][0]
    for _ in range(70):
        deep = {"role": "user", "content": "x", "deeper": deep}
    with pytest.raises(RequestError, match="nested more than 64 deep"):
        checked_messages([deep])
