"""The syntax in which a model calls tools, found in its chat template, and grammars that make it call one. Pure.

The marks are those of `tool_calls.py`; some are control tokens, which a text shows only where a request names them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiddler.sampling.constraint import json_rule
from fiddler.serving.answer_parts import ToolParser
from fiddler.serving.tool_calls import BareObjectParser, DeepSeekParser, HermesParser, MistralParser
from fiddler.text.harmony import HARMONY_MARKS, is_harmony

__all__ = ["ToolFormat", "tool_format"]

_DEEPSEEK = ["<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581begin\uff5c>"]
_DEEPSEEK += ["<\uff5ctool\u2581sep\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"]
_DEEPSEEK += ["<\uff5ctool\u2581calls\u2581end\uff5c>"]


@dataclass(frozen=True)
class ToolFormat:
    """How a model calls tools. `marks`: of its syntax; those that are control tokens must be named in the text.

    `around`: what stands before the name, between name and arguments, and behind them, of a single call; None where a
    call is an object with both. `before`, `after`: of the whole.
    """

    name: str
    parser: Callable[[Sequence[str]], ToolParser]
    marks: Sequence[str] = ()
    before: str = ""
    after: str = ""
    between: str | None = None
    harmony: bool = False  # the marks stand in every answer, not only in calls: see `harmony_answers.py`

    def grammar(self, tools: Sequence[Mapping[str, Any]], ids: Mapping[str, int], thinking: bool) -> str:
        """A Lark grammar of one call of one of `tools`, as OpenAI's API describes them.

        ids: of the marks that are control tokens. thinking: the prompt has opened reasoning, which goes before.
        """
        calls = [self._call(tool["function"], ids) for tool in tools]
        lines = [f"start: {'think ' if thinking else ''}{_literal(self.before, ids)} call {_literal(self.after, ids)}"]
        lines += ["call: " + " | ".join(f"call_{index}" for index in range(len(calls)))]
        lines += [f"call_{index}: {call}" for index, call in enumerate(calls)]
        if thinking:
            lines += ['think[stop="</think>"]: /(.|\\n)*/']
        return "\n".join(lines) + "\n"

    def _call(self, function: Mapping[str, Any], ids: Mapping[str, int]) -> str:
        parameters = function.get("parameters") or {"type": "object", "additionalProperties": False}
        if self.between is not None:
            return f"{_literal(function['name'] + self.between, ids)} {json_rule(parameters)}"
        properties = {"name": {"const": function["name"]}, "arguments": parameters}
        schema = {"type": "object", "properties": properties, "required": ["name", "arguments"]}
        return json_rule(schema | {"additionalProperties": False})


def _literal(text: str, ids: Mapping[str, int]) -> str:
    """A text as Lark has it, its control tokens by their ids."""
    for mark, token in ids.items():
        before, found, after = text.partition(mark)
        if found:
            return " ".join(part for part in (_literal(before, ids), f"<[{token}]>", _literal(after, ids)) if part)
    return json.dumps(text, ensure_ascii=False) if text else ""


def tool_format(template: str | None, names: Sequence[str] = ()) -> ToolFormat:
    """The format of a model with this chat template; a bare object where it shows no other."""
    if is_harmony(template):
        before, between = "<|channel|>commentary to=functions.", " <|constrain|>json<|message|>"
        return ToolFormat("harmony", BareObjectParser, HARMONY_MARKS, before, "", between, harmony=True)
    if template is not None and _DEEPSEEK[1] in template:
        named = f"function{_DEEPSEEK[2]}" in template or "'function'" in template or "```json" in template
        all_begin, begin, sep, end, all_end = _DEEPSEEK
        before = all_begin + begin + (f"function{sep}" if named else "")
        after = ("\n```" if named else "") + end + all_end
        return ToolFormat(
            "deepseek", lambda names: DeepSeekParser(), _DEEPSEEK, before, after, "\n```json\n" if named else sep
        )
    if template is not None and "[TOOL_CALLS]" in template:
        marks, named = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), "[ARGS]" in template
        if named:
            return ToolFormat("mistral", lambda names: MistralParser(), marks, "[TOOL_CALLS]", "", "[ARGS]")
        return ToolFormat("mistral", lambda names: MistralParser(), marks, "[TOOL_CALLS][", "]")
    if (
        template is not None
        and "<tool_call>" in template
        and "<function=" not in template
        and "<arg_key>" not in template
    ):
        ends = ("<tool_call>", "</tool_call>")
        return ToolFormat("hermes", lambda names: HermesParser(), ends, "<tool_call>\n", "\n</tool_call>")
    return ToolFormat("object", BareObjectParser)
