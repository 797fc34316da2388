"""Fuzzed texts of strangers that a language reads: chat templates with their messages, JSON schemas, grammars."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from fiddler.errors import RequestError
from fiddler.files.model_file import ModelFile
from fiddler.loading import DEMO_MODEL
from fiddler.sampling.constraint import Constraint, TokenGuide, schema_text
from fiddler.sampling.grammar_compiler import check, converted, from_schema
from fiddler.sampling.mask_process import MaskProcess
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.template_process import Limits
from fiddler.text.template_variables import TemplateVariables
from fiddler.text.tokenizer import Tokenizer
from fuzz.draw import Draw, changed_json
from fuzz.text_seeds import CONVERSATION, GRAMMARS, SCHEMA_KEYS, SCHEMAS, TEMPLATES, WORDS

__all__ = ["TEXT_RUNS", "TEXT_SEEDS", "demo_tokenizer"]

PLAIN = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
LIMITS = Limits(seconds=0.5, memory=64 << 20, characters=1 << 18)


@cache
def demo_tokenizer() -> Tokenizer:
    """The tokenizer of the shipped model."""
    return ModelFile.open(DEMO_MODEL).tokenizer


def changed_text(draw: Draw, text: str, words: Sequence[str]) -> str:
    """A text with up to four changes: a part less, a part twice, a word or a character more."""
    for _ in range(draw.below(5)):
        begin = draw.below(len(text) + 1)
        end = min(len(text), begin + draw.below(40))
        kind = draw.below(4)
        if kind == 0:
            text = text[:begin] + text[end:]
        elif kind == 1:
            text = text[:end] + text[begin:end] + text[end:]
        elif kind == 2:
            text = text[:begin] + draw.choice(words) + text[begin:]
        else:
            text = text[:begin] + draw.take(1 + draw.below(4)).decode("utf-8", "surrogateescape") + text[end:]
    return text


@cache
def _template(source: str) -> ChatTemplate:
    """A template that stays: with its process."""
    return ChatTemplate(source, demo_tokenizer(), {"bos_token": "<s>", "eos_token": "</s>"}, LIMITS)


def template(data: bytes, folder: Path) -> None:
    """Changed messages and variables through a template; of a template of ours, no message becomes a control token."""
    draw = Draw(data)
    source = draw.choice(TEMPLATES)
    content = json.loads(json.dumps(CONVERSATION))
    content = changed_json(draw, content, ("role", "content", "tool_calls", "reasoning_content", "thinking", "name"))
    variables = TemplateVariables(content.get("tools"), content.get("kwargs", {}))  # type: ignore[arg-type]
    messages = content.get("messages")
    plain = _template(PLAIN)
    ids = plain.ids(messages, variables)  # type: ignore[arg-type]
    control = {demo_tokenizer().bos_id, demo_tokenizer().eos_id}
    assert sum(token in control for token in ids) == 2 * len(messages)  # type: ignore[arg-type]
    if draw.below(2):
        assert isinstance(_template(source).ids(messages, variables), list)  # type: ignore[arg-type]
        return
    changed = ChatTemplate(
        changed_text(draw, source, WORDS["template"]), demo_tokenizer(), {"eos_token": "</s>"}, LIMITS
    )
    changed._process = _template(PLAIN)._process  # that runs already
    assert isinstance(changed.text(messages, variables), str)  # type: ignore[arg-type]


@cache
def _masks() -> MaskProcess:
    return MaskProcess(demo_tokenizer())


def _follow(constraint: Constraint) -> None:
    """The masks of a constraint's first tokens."""
    tokenizer = demo_tokenizer()
    guide = TokenGuide(_masks(), constraint.source, tokenizer.vocab_size, tokenizer.end_ids)
    for _ in range(3):
        allowed = guide.allowed()
        assert allowed.any()
        guide.advance(int(allowed.nonzero()[0][-1]))


def _library_reads(convert: Callable[[str], str], text: str, kind: str) -> bool:
    """Whether a text is read, in a fork of this process, since version 1.9 of the library faults at some schemas."""
    child = os.fork()
    if not child:
        for each in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL):
            signal.signal(each, signal.SIG_DFL)  # the fuzzer's handlers would call it a finding
        code = 1
        with suppress(BaseException):
            check(convert(text), kind)
            code = 0
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def schema(data: bytes, folder: Path) -> None:
    """A changed schema, read in a process as `Constraint.json_schema` has it read, and its first masks."""
    draw = Draw(data)
    text = draw.choice(SCHEMAS)
    if draw.below(4) == 1:
        text = changed_text(draw, text, WORDS["schema"])
    else:
        text = json.dumps(changed_json(draw, {"root": json.loads(text)}, SCHEMA_KEYS).get("root"))
    text = schema_text(text)
    if not _library_reads(from_schema, text, "the JSON schema"):
        raise RequestError("the JSON schema cannot be read")
    _follow(Constraint(from_schema(text)))


def grammar(data: bytes, folder: Path) -> None:
    """A changed grammar, read in a process but without the limits of its own; then its first masks."""
    draw = Draw(data)
    text = changed_text(draw, draw.choice(GRAMMARS), WORDS["grammar"])
    if not _library_reads(converted, text, "the grammar"):
        raise RequestError("the grammar cannot be read")
    _follow(Constraint(converted(text)))


TEXT_RUNS: dict[str, Callable[[bytes, Path], None]] = {"template": template, "schema": schema, "grammar": grammar}
TEXT_SEEDS = tuple(bytes([which, *rest]) for which in range(8) for rest in (b"", bytes(30), bytes(range(1, 50))))
