"""Conversations with tools, tool calls and reasoning, and the variables that families' templates know; ours and theirs.

`differing` renders them with transformers' `apply_chat_template` and with ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fiddler.errors import FiddlerError
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.messages import Message
from fiddler.text.template_variables import TemplateVariables

__all__ = ["CONVERSATIONS", "TOOLS", "Outcome", "compare"]

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a place: „sunny“ <b>or</b> 'not' & why.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "description": 'A town, as "Kyōto".'},
                    "days": {"type": "integer", "minimum": 1, "default": 3},
                    "units": {"type": ["string", "null"], "enum": ["C", "F"]},
                },
                "required": ["place"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]


def _message(role: str, content: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def _call(name: str, arguments: Any, number: int = 0) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


_PLACE = {"place": "Kyōto <1>", "days": 2, "units": None, "deep": [{"a": [1.5, True]}]}


def _with_tool(content: str | None, arguments: Any, *more: dict[str, Any], **fields: Any) -> list[Message]:
    return [
        _message("user", "How is the weather?"),
        _message("assistant", content, tool_calls=[_call("weather", arguments, 1), *more], **fields),
        _message("tool", '{"sky": "é"}', name="weather", tool_call_id="call00001"),
        *(_message("tool", "12:00", name="clock", tool_call_id="call00002") for _ in more),
    ]


CONVERSATIONS: dict[str, list[Message]] = {
    "one": [_message("user", "Hello")],
    "system": [_message("system", "  Be brief.\n"), _message("user", " Hi ")],
    "turns": [_message("system", "Be."), _message("user", "a"), _message("assistant", "b"), _message("user", "c")],
    "answered": [_message("user", "a"), _message("assistant", "<think>\nhm\n</think>\n\nb")],
    "reasoned": [
        _message("user", "a"),
        _message("assistant", "b", reasoning_content="\nbecause\n"),
        _message("user", "c"),
        _message("assistant", "d", reasoning_content="therefore"),
        _message("user", "e"),
    ],
    "thought": [_message("user", "a"), _message("assistant", "b", thinking="hm"), _message("user", "c")],
    "called": _with_tool("", _PLACE),
    "called with text": _with_tool("Let me see.", '{"place": "Kyōto"}', reasoning_content="I need it."),
    "called, null": _with_tool(None, _PLACE),
    "called twice, answered": [
        _message("system", "Use tools."),
        *_with_tool("", _PLACE, _call("clock", {}, 2)),
        _message("assistant", "Sunny at 12."),
        _message("user", "Thanks"),
    ],
    "texts for arguments, null": [*_with_tool(None, "{}", _call("clock", "{}", 2)), _message("assistant", "Sunny.")],
}
"""By name."""

_VARIABLES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "thinking": True, "reasoning_effort": "high", "documents": [{"title": "a", "text": "b"}]},
    {"thinking": False, "clear_thinking": False, "add_thoughts": True, "custom": [1, {"a": None}]},
)


class Outcome(NamedTuple):
    """Renderings: equal to transformers'; refused by both; by the template's own raise_exception or an error of
    transformers, but rendered by us in another of the messages' forms; cases that differ.
    """

    equal: int
    refused: int
    other_form: int
    differing: list[str]


def _cases() -> Iterator[tuple[str, list[Message], dict[str, Any], bool]]:
    for name, messages in CONVERSATIONS.items():
        for tools in (None, TOOLS):
            for number, variables in enumerate(_VARIABLES):
                for prompt in (True, False):
                    kwargs = {"tools": tools, **variables}
                    yield f"{name}, tools {tools is not None}, variables {number}, {prompt}", messages, kwargs, prompt


def compare(theirs: PreTrainedTokenizerBase, ours: ChatTemplate, *, ids: bool = True, step: int = 1) -> Outcome:
    """Render every conversation with and without tools, variables and the beginning of an answer, by both.

    step: take every so many of these 176 cases.
    """
    equal, refused, other, wrong = 0, 0, 0, []
    for label, messages, kwargs, prompt in islice(_cases(), 0, None, step):
        try:
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)
        except Exception:  # noqa: BLE001  # whatever Python's operators raise in a template
            expected = None
        variables = TemplateVariables(None, kwargs)
        try:
            text = ours.text(messages, variables, add_generation_prompt=prompt)
        except FiddlerError:
            text = None
        if expected is None:
            refused, other = refused + (text is None), other + (text is not None)
            continue
        same = text == expected
        if same and ids:
            encoded = theirs(expected, add_special_tokens=False)["input_ids"]
            same = ours.ids(messages, variables, add_generation_prompt=prompt) == encoded
        equal += same
        if not same:
            wrong.append(label)
    return Outcome(equal, refused, other, wrong)
