"""A body of OpenAI's chat API as a conversation: messages, tools, and what the template reads. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fiddler.errors import RequestError, quoted
from fiddler.serving.chat_prompts import Conversation
from fiddler.serving.http.errors import HttpError
from fiddler.serving.request_fields import flag

__all__ = ["checked_tools", "conversation_of", "refuse_media"]

_MOST_TOOLS = 512
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def conversation_of(body: Mapping[str, Any]) -> Conversation:
    """The conversation of a body. Raises RequestError, which names the field, for an invalid one."""
    messages = body.get("messages")
    refuse_media(messages)
    tools = checked_tools(body.get("tools"))
    begin = body.get("add_generation_prompt")
    continues = body.get("continue_final_message")
    if flag(body, "continue_final_message") and flag(body, "add_generation_prompt"):
        raise RequestError("add_generation_prompt and continue_final_message cannot both be true")
    return Conversation(
        messages,  # type: ignore[arg-type]  # checked by the prompt
        tools,
        _tool_choice(body.get("tool_choice"), bool(tools)),
        _variables(body),
        begin_answer=begin is not False or continues is True,
        continues=continues,
        split_reasoning=body.get("reasoning_format") != "none",
    )


def refuse_media(messages: object) -> None:
    """Raise HttpError for messages with parts that are no text: the models here read nothing else."""
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind.partition("_")[0] in ("image", "input", "audio", "video", "file"):
                name = "audio" if "audio" in kind else "image" if "image" in kind else kind[:20]
                raise HttpError(400, f"{name} input is not supported: the model reads text only")


def checked_tools(tools: object) -> list[Mapping[str, Any]]:
    """The functions among `tools`; other kinds of tools, which only their own server runs, are left out."""
    if tools is None:
        return []
    if not isinstance(tools, list) or len(tools) > _MOST_TOOLS:
        raise RequestError(f"tools are {quoted(tools)}; give a list of at most {_MOST_TOOLS} functions")
    functions: list[Mapping[str, Any]] = []
    for tool in tools:
        if not isinstance(tool, dict) or not isinstance(tool.get("type", "function"), str):
            raise RequestError(f"tools have {quoted(tool)}; give objects with a type and a function")
        if tool.get("type", "function") != "function":
            continue
        function = tool.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise RequestError(f"tools have the function {quoted(function)}; it must have a name")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise RequestError(f"the parameters of {quoted(name)} are {quoted(parameters)}; give a JSON schema")
        functions.append({**tool, "type": "function"})
    return functions


def _tool_choice(choice: object, has_tools: bool) -> str:
    """As `Conversation.tool_choice`."""
    if choice is None:
        return "auto"
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required", "any"):
            raise RequestError(f"tool_choice is {quoted(choice)}; give auto, none, required or a function")
        choice = "required" if choice == "any" else choice
        if choice == "required" and not has_tools:
            raise RequestError("tool_choice is required, but there are no tools")
        return choice
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        return "auto"
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice is {quoted(choice)}; give auto, none, required or a function")
    if not has_tools:
        raise RequestError(f"tool_choice names {quoted(name)}, but there are no tools")
    return f"function:{name}"


def _variables(body: Mapping[str, Any]) -> dict[str, Any]:
    """The template's own variables."""
    kwargs = body.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RequestError(f"chat_template_kwargs are {quoted(kwargs)}; give an object")
    effort = body.get("reasoning_effort")
    if effort is not None and effort not in _EFFORTS:
        raise RequestError(f"reasoning_effort is {quoted(effort)}; give one of {', '.join(_EFFORTS)}")
    own = {} if effort is None else {"reasoning_effort": effort}
    return own | (kwargs or {})
