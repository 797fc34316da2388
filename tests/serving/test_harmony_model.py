"""Harmony on a model whose vocabulary has its marks: a grammar makes the model write what is parsed."""

from __future__ import annotations

import pytest

import fiddler
from fiddler.chat import Chat
from fiddler.generation.request import Request
from fiddler.sampling.constraint import Constraint
from fiddler.serving.chat_prompts import ChatPrompts, Conversation
from fiddler.text.harmony import HARMONY_MARKS
from oracles.answer_cuts import parts
from oracles.synthetic import with_template, write_random_mixtral

IDS = dict(zip((*HARMONY_MARKS, "<|return|>", "<|call|>"), range(500, 507), strict=True))
# in the manner of gpt-oss's own, in few words
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.tool_calls %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set call = m.tool_calls[0].function %}<|start|>assistant to=functions.{{ call.name }}"
    "<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
USER = {"role": "user", "content": "Hi"}


def forced(*pieces):
    """A grammar of just this text, its marks as control tokens."""
    return Constraint.grammar("start: " + " ".join(f"<[{IDS[p]}]>" if p in IDS else f'"{p}"' for p in pieces) + "\n")


REASONED = (
    *("<|channel|>", "analysis", "<|message|>", "Hm. So.", "<|end|>"),
    *("<|start|>", "assistant", "<|channel|>", "final", "<|message|>", "Yes."),
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harmony")
    write_random_mixtral(folder / "plain.gguf", control={index: name for name, index in IDS.items()})
    return fiddler.load(with_template(folder / "plain.gguf", folder / "harmony.gguf", TEMPLATE), device="cpu")


def test_a_chat_shows_reasoning_apart_and_keeps_it_out_of_the_content(engine):
    chat = Chat(engine, constraint=forced(*REASONED))
    assert "".join(chat.send("Hi")) == "<think>\nHm. So.\n</think>\n\nYes."
    assert chat.messages == [USER, {"role": "assistant", "content": "Yes.", "thinking": "Hm. So."}]
    assert "".join(chat.send("Hi")).endswith("Yes.")


def test_a_chat_keeps_a_call_as_the_template_writes_it(engine):
    call = ("<|channel|>", "commentary to=functions.f ", "<|constrain|>", "json", "<|message|>", "{}")
    chat = Chat(engine, constraint=forced(*call), tools=[TOOL])
    assert "".join(chat.send("Hi")) == "f({})"
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert chat.messages[1] == {"role": "assistant", "tool_calls": calls}
    assert "".join(chat.send({"role": "tool", "content": "3"})) == "f({})"


@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_a_server_s_answer_has_its_parts(engine, tools):
    prompts = ChatPrompts(engine.tokenizer, engine.model_file.file.metadata)
    prompt = prompts.prompt(Conversation([USER], tools))
    request = Request(prompt.ids, max_tokens=60, constraint=forced(*REASONED), named_tokens=prompt.named_tokens)
    pieces = list(engine.start(request))
    assert parts(prompt.parser(), pieces) == ("Hm. So.", "Yes.", [])
    assert prompt.ids.count(IDS["<|start|>"]) == 2
    prompts.close()


def test_a_server_makes_a_model_call_a_tool(engine):
    prompts = ChatPrompts(engine.tokenizer, engine.model_file.file.metadata)
    prompt = prompts.prompt(Conversation([USER], [TOOL], "required"))
    constraint = Constraint.grammar(prompt.grammar)
    sampling = fiddler.Sampling(temperature=0.0)
    request = Request(prompt.ids, sampling, 100, constraint=constraint, named_tokens=prompt.named_tokens)
    reasoning, content, calls = parts(prompt.parser(), list(engine.start(request)))
    assert (reasoning, content) == ("", "")
    assert [name for name, _ in calls] == ["f"]
    assert calls[0][1].startswith("{")
    prompts.close()


def test_a_begun_answer_stands_behind_the_header_of_its_message(engine):
    prompts = ChatPrompts(engine.tokenizer, engine.model_file.file.metadata)
    begun = {"role": "assistant", "content": "Well, <|end|>"}
    prompt = prompts.prompt(Conversation([USER, begun]))
    assert prompts.text(Conversation([USER, begun])).endswith("assistant<|channel|>final<|message|>Well, <|end|>")
    tail = prompt.ids[prompt.ids.index(IDS["<|channel|>"]) :]
    assert tail.count(IDS["<|end|>"]) == 0  # a user's text makes no control tokens
    assert parts(prompt.parser(), [" yes."]) == ("", " yes.", [])
    prompts.close()
