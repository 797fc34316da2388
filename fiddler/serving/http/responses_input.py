"""A body of OpenAI's responses API as a conversation and settings. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.serving.chat_prompts import Conversation
from fiddler.serving.http.conversations import conversation_of
from fiddler.serving.http.errors import HttpError

__all__ = ["responses_conversation", "responses_settings"]

_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def responses_settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the chat API's names for what is called otherwise."""
    text = body.get("text")
    form = text.get("format") if isinstance(text, dict) else None
    return {**body, "response_format": form, "n": None, "stop": body.get("stop")}


def responses_conversation(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a body. Raises RequestError, which names the field, for an invalid one."""
    if body.get("previous_response_id"):
        raise HttpError(400, "previous_response_id: past responses are not stored here; send the whole input")
    given = body.get("input", "")
    messages: list[dict[str, Any]] = []
    instructions = body.get("instructions")
    if instructions is not None:
        if not isinstance(instructions, str):
            raise RequestError(f"instructions are {quoted(instructions)}; give a text")
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif isinstance(given, list):
        for item in given:
            _append(messages, item)
    else:
        raise RequestError(f"the input is {quoted(given)}; give a text or a list of items")
    if not messages or messages[-1]["role"] == "system":
        messages.append({"role": "user", "content": ""})
    reasoning = body.get("reasoning")
    effort = reasoning.get("effort") if isinstance(reasoning, dict) else None
    return conversation_of(
        {
            "messages": messages,
            "tools": _tools(body.get("tools")),
            "tool_choice": body.get("tool_choice"),
            "chat_template_kwargs": body.get("chat_template_kwargs"),
            "reasoning_effort": effort,
        }
    )


def _append(messages: list[dict[str, Any]], item: object) -> None:
    """Add an item; a call and reasoning belong to the assistant's message before or after them."""
    if not isinstance(item, dict):
        raise RequestError(f"the input has {quoted(item)}; give items with a type")
    kind = item.get("type", "message")
    if kind == "message":
        role, text = item.get("role"), _text(item.get("content"))
        if not isinstance(role, str):
            raise RequestError(f"the input has a message whose role is {quoted(role)}; give a text")
        last = messages[-1] if messages else {}
        if role == "assistant" and last.get("role") == "assistant" and not last.get("content"):
            last["content"] = text
        else:
            messages.append({"role": role, "content": text})
    elif kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        messages.append({"role": "assistant", "content": "", "reasoning_content": _text(parts)})
    elif kind == "function_call":
        name, arguments = item.get("name"), item.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str):
            raise RequestError(f"the input has the call {quoted(item)}; give its name and arguments as texts")
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        call = {"id": item.get("call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _text(item.get("output"))})
    else:
        raise RequestError(f"the input has an item of type {quoted(kind)}, which is not known here")


def _text(content: object) -> str:
    """A text, or parts of text, as one text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"a content of the input is {quoted(content)}; give a text or parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_image", "input_file", "input_audio"):
            raise HttpError(400, f"{kind.removeprefix('input_')} input is not supported: the model reads text only")
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(text, str):
            raise RequestError(f"a content of the input has the part {quoted(part)}; give parts of text")
        texts.append(text)
    return "\n".join(texts)


def _tools(tools: object) -> list[dict[str, Any]] | None:
    """Functions as the chat API has them; others, as web_search, run on OpenAI's servers only and are left out."""
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestError(f"tools are {quoted(tools)}; give a list of objects")
    functions = [tool for tool in tools if tool.get("type") == "function"]
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        for tool in functions
    ]
