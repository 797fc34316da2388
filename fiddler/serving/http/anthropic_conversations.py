"""A body of Anthropic's messages API as a conversation and settings. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.serving.chat_prompts import Conversation
from fiddler.serving.http.conversations import conversation_of
from fiddler.serving.http.errors import HttpError

__all__ = ["anthropic_conversation", "anthropic_settings"]

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def anthropic_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with OpenAI's names for what is called otherwise."""
    return {**body, "stop": body.get("stop_sequences"), "n": None, "logprobs": None}


def anthropic_conversation(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a body. Raises RequestError, which names the field, for an invalid one."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise RequestError(f"messages are {quoted(messages)}; give a list")
    converted: list[dict[str, Any]] = []
    if body.get("system") is not None:
        converted.append({"role": "system", "content": _text("system", body["system"])})
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"message {index} is {quoted(message)}; it must have a role and a content")
        converted += _converted(index, message)
    if not messages:
        converted.append({"role": "user", "content": ""})
    choice = body.get("tool_choice")
    return conversation_of(
        {
            "messages": converted,
            "tools": _tools(body.get("tools")),
            "tool_choice": None if choice is None else _choice(choice),
            "chat_template_kwargs": body.get("chat_template_kwargs"),
        }
    )


def _converted(index: int, message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A message as one of the assistant or the user, after messages with the results of tools that it holds."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"role": message["role"], "content": content}]
    if not isinstance(content, list):
        raise RequestError(f"message {index} has the content {quoted(content)}; give a text or blocks")
    texts, thoughts, calls, results = list[str](), list[str](), list[dict[str, Any]](), list[dict[str, Any]]()
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text":
            texts.append(_string(index, block, "text"))
        elif kind == "thinking":
            thoughts.append(_string(index, block, "thinking"))
        elif kind == "tool_use":
            function = {"name": _string(index, block, "name"), "arguments": json.dumps(block.get("input") or {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = _text(f"message {index}", block.get("content") or "")
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        elif kind != "redacted_thinking":
            _refuse_block(index, block)
    converted: dict[str, Any] = {"role": message["role"], "content": "\n".join(texts)}
    converted |= {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
    converted |= {"tool_calls": calls} if calls else {}
    keeps = texts or thoughts or calls or not results
    return [*results, converted] if keeps else results


def _string(index: int, block: Mapping[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"message {index} has a block whose {name} is {quoted(value)}; give a text")
    return value


def _text(name: str, content: object) -> str:
    """A text, or blocks of text, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{name} has {quoted(content)}; give a text or blocks of text")
    texts = []
    for block in content:
        text = block.get("text") if isinstance(block, dict) and block.get("type") == "text" else None
        if not isinstance(text, str):
            _refuse_block(name, block)
        texts.append(str(text))
    return "\n".join(texts)


def _refuse_block(where: object, block: object) -> None:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind in ("image", "document"):
        raise HttpError(400, f"{kind} input is not supported: the model reads text only")
    raise RequestError(f"message {where} has the block {quoted(block)}, which is not known here")


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """Tools as OpenAI has them; those that only Anthropic's servers run are left out."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f"tools are {quoted(tools)}; give a list of objects")
    functions = []
    for tool in tools:
        if tool.get("type", "custom") != "custom":
            continue
        function = {"name": tool.get("name"), "description": tool.get("description") or ""}
        functions.append({"type": "function", "function": {**function, "parameters": tool.get("input_schema")}})
    return functions


def _choice(choice: object) -> Any:
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool" and isinstance(choice, dict):
        return {"type": "function", "function": {"name": choice.get("name")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise RequestError(f"tool_choice is {quoted(choice)}; its type must be auto, any, none or tool")
    return _CHOICES[kind]
