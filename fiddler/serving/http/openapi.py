"""GET /openapi.json: the routes, the fields that they read, and their statuses, as OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from fiddler.serving.http.body import service_of
from fiddler.serving.http.sse import JsonAnswer

__all__ = ["description", "openapi"]


async def openapi(request: Request) -> Response:
    """The description of this server."""
    return JsonAnswer(description(service_of(request).options.version))


def _number(low: float | None = None, high: float | None = None, kind: str = "number") -> dict[str, Any]:
    limits = {"minimum": low, "maximum": high}
    return {"type": [kind, "null"], **{name: limit for name, limit in limits.items() if limit is not None}}


_TEXT = {"type": ["string", "null"]}
_FLAG = {"type": ["boolean", "null"]}
_OBJECT = {"type": ["object", "null"]}
_STRINGS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}
_TOKENS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {"anyOf": [{"type": "string"}, _TOKENS, {"type": "array", "items": {"anyOf": [{"type": "string"}, _TOKENS]}}]}
_CONTENT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}
_ROLES = ["system", "developer", "user", "assistant", "tool"]
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {"role": {"enum": _ROLES}, "content": _CONTENT, "reasoning_content": _TEXT},
        "required": ["role", "content"],
    },
}
_FUNCTION = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1}, "description": _TEXT, "parameters": _OBJECT},
    "required": ["name"],
}
_TOOLS = {
    "type": ["array", "null"],
    "items": {
        "type": "object",
        "properties": {"type": {"const": "function"}, "function": _FUNCTION},
        "required": ["type", "function"],
    },
}
_SAMPLING = {
    "temperature": _number(0),
    "top_k": _number(kind="integer"),
    "top_p": _number(0, 1),
    "min_p": _number(0, 1),
    "typical_p": _number(0, 1),
    "repeat_penalty": _number(1e-6, 1e6),
    "repeat_last_n": _number(-1, kind="integer"),
    "presence_penalty": _number(-1e6, 1e6),
    "frequency_penalty": _number(-1e6, 1e6),
    "dry_multiplier": _number(0, 1e6),
    "xtc_probability": _number(0, 1),
    "seed": _number(kind="integer"),
    "logit_bias": _OBJECT,
    "n_probs": _number(0, 128, "integer"),
    "stop": _STRINGS,
    "ignore_eos": _FLAG,
    "cache_prompt": _FLAG,
    "service_tier": _TEXT,
    "grammar": _TEXT,
    "json_schema": _OBJECT,
    "stream": _FLAG,
    "n": _number(1, 128, "integer"),
    "timings_per_token": _FLAG,
    "return_progress": _FLAG,
}
_OPENAI = {
    "model": _TEXT,
    "max_tokens": _number(-1, kind="integer"),
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
    "response_format": _OBJECT,
}
_CHAT = {
    "messages": _MESSAGES,
    "tools": _TOOLS,
    "tool_choice": {"anyOf": [{"enum": ["auto", "none", "required", None]}, {"type": "object"}]},
    "chat_template_kwargs": _OBJECT,
    "logprobs": _FLAG,
    "top_logprobs": _number(0, 128, "integer"),
    "reasoning_format": _TEXT,
}
_BLOCK = {
    "type": "object",
    "properties": {"type": {"type": "string"}, "text": {"type": "string"}},
    "required": ["type"],
}
_BLOCKS = {"anyOf": [{"type": "string"}, {"type": "array", "items": _BLOCK}]}
_ANTHROPIC = {
    "model": _TEXT,
    "system": {"anyOf": [_BLOCKS, {"type": "null"}]},
    "messages": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"role": {"enum": ["user", "assistant"]}, "content": _BLOCKS},
            "required": ["role", "content"],
        },
    },
    "tools": {
        "type": ["array", "null"],
        "items": {
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 1}, "input_schema": {"type": "object"}},
            "required": ["name", "input_schema"],
        },
    },
    "tool_choice": _OBJECT,
}
_RESPONSES = {
    "model": _TEXT,
    "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    "instructions": _TEXT,
    "max_output_tokens": _number(-1, kind="integer"),
    "tools": {"type": ["array", "null"], "items": {"type": "object"}},
    "text": _OBJECT,
    "reasoning": _OBJECT,
    "stream": _FLAG,
    "temperature": _number(0),
    "top_p": _number(0, 1),
}
_BODIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "/v1/chat/completions": ("Answer a conversation", {**_SAMPLING, **_OPENAI, **_CHAT}, ["messages"]),
    "/v1/chat/completions/input_tokens": ("Count a conversation's tokens", _CHAT, ["messages"]),
    "/v1/completions": (
        "Continue texts",
        {**_SAMPLING, **_OPENAI, "prompt": _PROMPT, "echo": _FLAG, "logprobs": _number(0, 128, "integer")},
        ["prompt"],
    ),
    "/v1/responses": ("Answer items", _RESPONSES, []),
    "/v1/responses/input_tokens": ("Count the tokens of items", _RESPONSES, []),
    "/v1/messages": (
        "Answer a conversation, as Anthropic",
        {
            **_ANTHROPIC,
            **{name: _SAMPLING[name] for name in ("temperature", "top_p", "top_k", "stream")},
            "max_tokens": _number(0, kind="integer"),
            "stop_sequences": {"type": ["array", "null"], "items": {"type": "string"}},
        },
        ["messages"],
    ),
    "/v1/messages/count_tokens": ("Count a conversation's tokens, as Anthropic", _ANTHROPIC, ["messages"]),
    "/completion": (
        "Continue texts, as llama.cpp's server",
        {**_SAMPLING, "prompt": _PROMPT, "n_predict": _number(-1, kind="integer"), "return_tokens": _FLAG},
        ["prompt"],
    ),
    "/tokenize": ("Ids of a text", {"content": {"type": "string"}, "add_special": _FLAG, "with_pieces": _FLAG}, []),
    "/detokenize": ("Text of ids", {"tokens": _TOKENS}, []),
    "/apply-template": ("Text of a conversation", _CHAT, ["messages"]),
}
_GET = {
    "/health": "Whether requests are computed",
    "/v1/models": "The model",
    "/props": "Properties of the server",
    "/slots": "What runs now",
    "/metrics": "Metrics for Prometheus",
    "/experts": "Places and counts of experts",
    "/experts/events": "The same as server-sent events, whenever they change",
}
_FAILURES = {
    "400": "The request makes no sense",
    "401": "The API key is missing or wrong",
    "403": "The Host header names another host",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "503": "Too many requests, or the server stops",
}


def description(version: str) -> dict[str, Any]:
    """The OpenAPI object."""
    responses: dict[str, Any] = {"200": {"description": "Done"}}
    responses |= {status: {"description": text} for status, text in _FAILURES.items()}
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": responses}} for path, summary in _GET.items()
    }
    for path, (summary, properties, required) in _BODIES.items():
        schema = {"type": "object", "properties": properties, "required": required}
        content = {"application/json": {"schema": schema}}
        operation = {"summary": summary, "requestBody": {"required": True, "content": content}, "responses": responses}
        paths[path] = {"post": operation}
    return {"openapi": "3.1.0", "info": {"title": "fiddler", "version": version}, "paths": paths}
