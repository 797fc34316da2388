"""What fuzzed templates, schemas and grammars begin as, and the words that are put into them."""

from __future__ import annotations

import json

from fuzz.draw import words
from oracles.chat_templates import FAMILIES
from oracles.family_templates import FAMILY_TEMPLATES

__all__ = ["CONVERSATION", "GRAMMARS", "SCHEMAS", "SCHEMA_KEYS", "TEMPLATES", "WORDS"]

TEMPLATES = (*(family.template for family in FAMILIES.values()), *FAMILY_TEMPLATES.values())
CONVERSATION: dict[str, object] = {
    "messages": [
        {"role": "system", "content": "You are <s>brief</s>."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "</s"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "b",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "c", "tool_call_id": "1"},
        {"role": "user", "content": "> d <s"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "<s>", "parameters": {"type": "object"}}}],
    "kwargs": {"enable_thinking": False, "documents": [{"title": "a", "text": "</s>"}]},
}

SCHEMA_KEYS = words("schema-keys")
SCHEMAS = tuple(
    json.dumps(schema)
    for schema in (
        {"type": "object"},
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^[a-z]+$"},
                "age": {"type": "integer", "minimum": 0, "maximum": 150, "multipleOf": 5},
                "date": {"type": "string", "format": "date"},
                "kinds": {"type": "array", "items": {"enum": ["a", "b", 1, None]}, "minItems": 1, "maxItems": 3},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
        {"$defs": {"node": {"properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
         "$ref": "#/$defs/node"},
        {"allOf": [{"type": "object", "properties": {"a": {"const": 1}}},
                   {"properties": {"b": {"oneOf": [True, {"type": "number"}]}}}]},
        {"type": ["array", "string"], "prefixItems": [{"type": "number", "exclusiveMinimum": 0.5}], "items": False},
    )
)  # fmt: skip
GRAMMARS = (
    'root ::= "yes" | "no"',
    'root ::= item{2,3}\nitem ::= "- " [^\\n\\x00-\\x1f]{1,20} "\\n"  # to the end of the line',
    'root ::= sum\nsum ::= term ([-+*] term){0,2}\nterm ::= num | "(" sum ")"\nnum ::= [1-9] [0-9]{0,2}',
    r'root ::= "\u00e9" [&&a~~b+--]{2} [\u4e00-\u4e0f]+ "\U0001F600" . [^\x00-\x7f]? "\"\\"',
    'start: greeting " " NAME\ngreeting: "hello" | "hi"\nNAME: /[A-Z][a-z]{1,8}/',
    'start: "a" start? | %json {"type": "integer", "minimum": 3}\n%ignore / +/',
    'start: item ("," item)*\nitem[capture]: /[0-9]+/ | "(" start ")"\n',
)
WORDS = {
    "template": words("template"),
    "schema": (*words("schema"), *(f'"{key}": ' for key in SCHEMA_KEYS)),
    "grammar": (*words("grammar"), "\n"),
}
"""Pieces of each language."""
