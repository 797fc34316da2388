"""What a chat template reads beside the messages: tools, and variables of its own. Pure; knows no template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Never

from fiddler.errors import RequestError, quoted
from fiddler.text.messages import plain

__all__ = ["TemplateVariables", "parse_variables"]

_OURS = ("messages", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TemplateVariables:
    """tools: functions that the model may call, each an object as in OpenAI's API, with a JSON schema of its arguments.

    kwargs: the template's own variables, as `{"enable_thinking": False}`; `tools` may stand among them.
    Raises RequestError for tools that are no list of objects, and for variables that have another source.
    """

    tools: Sequence[Mapping[str, Any]] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.kwargs, Mapping):
            raise RequestError(f"chat_template_kwargs are {quoted(self.kwargs)}; give an object")
        kwargs = plain("chat_template_kwargs", self.kwargs)
        own = next((name for name in kwargs if name in _OURS), None)
        if own is not None:
            raise RequestError(f"chat_template_kwargs have {own}, which fiddler sets; leave it out")
        among = kwargs.pop("tools", None)
        if among is not None and self.tools is not None:
            raise RequestError("tools are given twice, by themselves and in chat_template_kwargs; give them once")
        tools = among if self.tools is None else self.tools
        if tools is not None:
            if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
                raise RequestError(f"tools are {quoted(tools)}; give a list of objects, each a function's description")
            tools = plain("tools", tools)
        object.__setattr__(self, "tools", tools)
        object.__setattr__(self, "kwargs", kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All of them by the names that templates have."""
        return {"documents": None, **self.kwargs, "tools": self.tools}


def parse_variables(text: str) -> TemplateVariables:
    """The variables in a JSON object, as `{"enable_thinking": false}`. Raises RequestError for any other text."""

    def refuse(name: str) -> Never:
        raise ValueError(name)

    try:
        kwargs = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        kwargs = None
    if not isinstance(kwargs, dict):
        raise RequestError(f'{quoted(text)} is no JSON object; give one, as {{"enable_thinking": false}}')
    return TemplateVariables(None, kwargs)
