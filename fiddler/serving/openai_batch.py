"""Lines of OpenAI's batch files, as ours: `custom_id`, and in `body` a request to chat completions or completions.

https://platform.openai.com/docs/guides/batch and /docs/api-reference/chat. Fields that change the text and that
fiddler does not have are refused; those about accounts and transport have no effect. Knows no model.
"""

from __future__ import annotations

import json
from typing import Any

from fiddler.errors import RequestError, quoted

__all__ = ["from_openai", "is_openai", "schema_of"]

_SAME = (
    *("prompt", "messages", "max_tokens", "stop", "temperature", "top_p", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "response_format", "tools", "chat_template_kwargs"),
)
_IGNORED = frozenset(
    {"model", "user", "store", "metadata", "service_tier", "stream", "stream_options", "parallel_tool_calls"}
)
_OURS = frozenset({"top_k", "min_p", "typical_p", "repeat_penalty", "ignore_eos"})  # other servers take these as well
_PATHS = ("/v1/chat/completions", "/v1/completions")


def is_openai(line: dict[str, Any]) -> bool:
    """Whether a line has OpenAI's form."""
    return "custom_id" in line or "body" in line


def from_openai(line: dict[str, Any]) -> dict[str, Any]:
    """The line in our form. Raises RequestError, which names the field, for what cannot be done."""
    body, path = line.get("body"), line.get("url", _PATHS[0])
    if not isinstance(body, dict):
        raise RequestError(f"body is {quoted(body)}; give the object of a request")
    if path not in _PATHS:
        raise RequestError(f"url is {quoted(path)}; give {' or '.join(_PATHS)}")
    if body.get("n", 1) not in (1, None):
        raise RequestError(f"n is {quoted(body['n'])}; give one line for each text")
    fields: dict[str, Any] = {"id": line.get("custom_id")}
    for name, value in body.items():
        if value is None or name in _IGNORED or name == "n":
            continue
        if name in _SAME or name in _OURS:
            fields[name] = value
        elif name == "tool_choice":
            if value not in ("auto", "none"):
                raise RequestError(f"tool_choice is {quoted(value)}; give auto or none: the model chooses")
        elif name == "max_completion_tokens":
            fields["max_tokens"] = value
        elif name == "logprobs":
            fields["n_probs"] = body.get("top_logprobs", 1) if value is True else value or None
        elif name != "top_logprobs":
            raise RequestError(f"the field {quoted(name)} of a body is not known here; leave it out")
    if body.get("tool_choice") == "none":
        fields.pop("tools", None)
    return fields


def schema_of(response_format: object) -> str | None:
    """The JSON schema of a `response_format`; None where it asks for text. Raises RequestError for others."""
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return '{"type": "object"}'
    if kind == "json_schema" and isinstance(response_format, dict):
        wrapped = response_format.get("json_schema")
        if isinstance(wrapped, dict) and isinstance(wrapped.get("schema"), dict):
            return json.dumps(wrapped["schema"])
    raise RequestError(
        f"response_format is {quoted(response_format)}; its type must be text, json_object or json_schema"
    )
