"""Bodies by path, headers and methods of which fuzzed HTTP requests are made."""

from __future__ import annotations

from typing import Any

from fuzz.draw import words

__all__ = ["BODIES", "HEADERS", "KEYS", "METHODS"]

_TOOL = {"name": "f", "description": "a", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
_CHAT: dict[str, Any] = {
    "model": "a",
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "Once"}]},
    ],
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["b"],
    "n": 1,
}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "b"},
    ],
    "tools": [{"type": "function", "function": _TOOL}],
    "tool_choice": "auto",
    "stream": True,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
_COMPLETION: dict[str, Any] = {
    "prompt": ["Once", [5, 6, " upon"]],
    "max_tokens": 2,
    "echo": True,
    "suffix": None,
    "logprobs": 2,
    "logit_bias": {"5": 1.5, " a": -100},
    "seed": 7,
    "stream": True,
}
_RESPONSES: dict[str, Any] = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "b"},
    ],
    "instructions": "c",
    "max_output_tokens": 2,
    "tools": [{"type": "function", **_TOOL}],
    "text": {"format": {"type": "json_schema", "name": "d", "schema": {"type": "object"}}},
    "stream": True,
}
_MESSAGES: dict[str, Any] = {
    "max_tokens": 2,
    "system": [{"type": "text", "text": "a"}],
    "messages": [
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "c"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "any"},
    "thinking": {"type": "disabled"},
    "stop_sequences": ["d"],
    "stream": True,
}
_LLAMA: dict[str, Any] = {
    "prompt": "Once",
    "n_predict": 2,
    "n_probs": 2,
    "grammar": 'root ::= "a" | "b"',
    "json_schema": {"type": "integer"},
    "cache_prompt": True,
    "samplers": ["top_k"],
    "return_tokens": True,
    "stream": True,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _CHAT,
    "/chat/completions": _TOOLS,
    "/v1/chat/completions/input_tokens": _CHAT,
    "/chat/completions/input_tokens": _TOOLS,
    "/v1/completions": _COMPLETION,
    "/v1/responses": _RESPONSES,
    "/responses": {"input": "a", "max_output_tokens": 2, "reasoning": {"effort": "low"}, "stream": False},
    "/v1/responses/input_tokens": _RESPONSES,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/completion": _LLAMA,
    "/completions": {"prompt": ["a", "b"], "n_predict": 1, "response_fields": ["content", "timings/prompt_n"]},
    "/tokenize": {"content": "Once <s>", "add_special": True, "parse_special": True, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 300]},
    "/apply-template": {"messages": [{"role": "user", "content": "a"}], "tools": [_TOOL]},
}
KEYS = words("http-keys")
HEADERS: tuple[tuple[bytes, tuple[bytes, ...]], ...] = (
    (b"host", (b"localhost", b"example.org", b"[::1]:80", b"[::1", b"", b"127.0.0.1.", b"127.1", b"\xff")),
    (b"content-type", (b"text/plain", b"application/json; charset=utf-16", b"APPLICATION/JSON", b"", b"\xff")),
    (b"content-length", (b"0", b"-1", b"99999999", b"9" * 400, b"1e3", b"\xb2", b"")),
    (b"transfer-encoding", (b"chunked", b"gzip")),
    (b"authorization", (b"Bearer sk-the-secret-key", b"Bearer", b"Basic YTpi", b"bearer \xff", b"")),
    (b"x-api-key", (b"sk-the-secret-key", b"\xe9", b"")),
    (b"origin", (b"https://example.org", b"null", b"https://evil.example", b"\xff")),
    (b"accept", (b"text/event-stream", b"*/*", b"\xff")),
    (b"accept-encoding", (b"gzip", b"br;q=x")),
    (b"last-event-id", (b"3",)),
    (b"anthropic-version", (b"2023-06-01", b"x")),
    (b"if-none-match", (b"*", b'W/"a"')),
    (b"range", (b"bytes=0-1", b"bytes=-")),
    (b"cookie", (b"a=b", b";;;=\xff")),
    (b"expect", (b"100-continue",)),
)
"""Names, each with values that some code may mind."""
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "QUERY", "get", "A" * 300)
