"""Messages of a chat, as OpenAI's API and chat templates have them: roles, texts, tool calls. Pure; knows no template.

A message is an object with a `role` and a `content`: a text, or a list of parts of type "text"; null where the message
only calls tools. Beside them it may have whatever a template reads, as `tool_calls` or `reasoning_content`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fiddler.errors import RequestError, quoted

__all__ = ["Message", "checked_messages", "forms", "plain", "system_in_user"]

Message = Mapping[str, Any]
"""`role` ("system", "user", "assistant", "tool") and `content`; further fields of JSON's types."""

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, as in transformers
_DEEPEST = 64  # lists and objects in each other


def checked_messages(messages: object) -> list[Message]:
    """Messages with texts for contents: text parts are joined by line breaks, as llama.cpp's server does.

    Raises RequestError, which names the message, for anything but a list of messages.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages are {quoted(messages)}; give a list of at least one")
    return [_checked(index, message) for index, message in enumerate(messages)]


def _checked(index: int, message: object) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or not {"content", "tool_calls"} & message.keys():
        raise RequestError(f"message {index} is {quoted(message)}; it must have a role and a content")
    fields: dict[str, Any] = plain(f"message {index}", dict(message))
    calls = fields.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise RequestError(f"message {index}: 'tool_calls' is {quoted(calls)}; it must be a list of objects")
    if "content" in fields:
        fields["content"] = _joined(index, fields["content"])
    for key in ("role", "content"):
        text = fields.get(key)
        if not isinstance(text, str) and not (key == "content" and text is None and calls):
            raise RequestError(f"message {index}: {quoted(key)} is {quoted(text)}; it must be a string")
    return fields


def plain(name: str, value: object, depth: int = 0) -> Any:
    """`value` as JSON's types. Raises RequestError, which begins with `name`, for one that JSON cannot hold."""
    if depth > _DEEPEST:
        raise RequestError(f"{name} is nested more than {_DEEPEST} deep; give a flatter one")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{name} has the key {quoted(key)}; JSON's objects have strings for keys")
        return {str(key): plain(f"{name}: {quoted(key)}", each, depth + 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(name, each, depth + 1) for each in value]
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RequestError(f"{name} is {quoted(value)}; give what JSON can hold")


def system_in_user(messages: Sequence[Message]) -> list[Message] | None:
    """`messages` with the first, a system message, put before the first user message's text; None where not possible.

    As mistral-common does for models that were trained without system messages: a blank line stands between the two.
    """
    if messages[0]["role"] != "system":
        return None
    rest = [dict(message) for message in messages[1:]]
    user = next((message for message in rest if message["role"] == "user"), None)
    if user is None:
        return None
    user["content"] = f"{messages[0]['content']}\n\n{user['content']}"
    return list(rest)


def forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages as templates want them, first as transformers passes them; the others for where that one fails.

    That is without fields that are null, and with the reasoning under each of its names. Other forms have null
    (DeepSeek-V3's template) or no text (Qwen3's) for the content of a message that only calls tools, and the calls'
    arguments as objects (GLM-4.5's) or as texts (DeepSeek's): OpenAI's API has null and texts.
    """
    given: list[list[Message]] = []
    for arguments in (lambda value: value, _as_object, _as_text):
        for empty in ({}, {"content": None}, {"content": ""}):
            form = [_form(message, arguments, empty) for message in messages]
            if form not in given:
                given.append(form)
                yield form


def _form(message: Message, arguments: Callable[[Any], Any], empty: Message) -> Message:
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING if key in fields), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    if "tool_calls" in fields:
        fields = {**empty, **fields}
        fields["tool_calls"] = [_call(call, arguments) for call in fields["tool_calls"]]
    return fields


def _call(call: Any, arguments: Callable[[Any], Any]) -> Any:
    """A tool call whose arguments, in it or in its `function`, are in another form."""
    if not isinstance(call, dict):
        return call
    changed = {key: _call(value, arguments) if key == "function" else value for key, value in call.items()}
    return changed | {"arguments": arguments(changed["arguments"])} if "arguments" in changed else changed


def _as_object(value: Any) -> Any:
    try:
        decoded = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value
    return decoded if isinstance(decoded, dict) else value


def _as_text(value: Any) -> Any:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _joined(index: int, content: object) -> object:
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"message {index} has the part {quoted(part)}; only parts of type text are read")
        texts.append(part["text"])
    return "\n".join(texts)
