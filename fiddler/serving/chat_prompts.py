"""Prompts of conversations: messages through a model's chat template, an answer that is begun, and its parser.

Knows a tokenizer and a template; no protocol and no engine. Several threads may use it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fiddler.errors import FileFormatError, RequestError, quoted
from fiddler.serving.answer_parts import THINK, AnswerParser, ReasoningParser
from fiddler.serving.harmony_answers import HarmonyParser
from fiddler.serving.tool_formats import ToolFormat, tool_format
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.harmony import OPENS_FINAL
from fiddler.text.messages import Message, checked_messages
from fiddler.text.template_variables import TemplateVariables
from fiddler.text.tokenizer import Tokenizer

__all__ = ["ChatPrompt", "ChatPrompts", "Conversation"]

_RENDERERS = 2  # processes, so that one slow conversation does not hold up all others
_TAIL = 16  # tokens at the end of a prompt, where it may open reasoning


@dataclass(frozen=True)
class Conversation:
    """What a chat request asks to be answered.

    tools: functions as OpenAI's API describes them. tool_choice: "auto"; "none"; "required"; or a function's name after
    "function:". begin_answer: whether the prompt begins an answer. continues: the last message, of the assistant, is
    the beginning of the answer. split_reasoning: whether reasoning is told from content.
    """

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    kwargs: Mapping[str, Any] | None = None
    begin_answer: bool = True
    continues: bool | None = None  # None: if it is the assistant's
    split_reasoning: bool = True


@dataclass(frozen=True)
class ChatPrompt:
    """A prompt's ids, and what follows from the conversation for the text that is generated.

    grammar: Lark; the text must be a call of a tool. named_tokens: control tokens that the parser must see. begun: the
    prompt ends with the beginning of the answer.
    """

    ids: list[int]
    thinking: bool
    conversation: Conversation
    format: ToolFormat
    grammar: str | None = None
    named_tokens: frozenset[int] = frozenset()
    begun: bool = False  # whether the prompt has the beginning of the answer

    def parser(self) -> AnswerParser | HarmonyParser:
        """A parser for one answer."""
        conversation = self.conversation
        names = [tool["function"]["name"] for tool in conversation.tools]
        if self.format.harmony:
            calls = bool(names) and conversation.tool_choice != "none"
            return HarmonyParser(begun=self.begun, split_reasoning=conversation.split_reasoning, tools=calls)
        tools = self.format.parser(names) if names and conversation.tool_choice != "none" else None
        return AnswerParser(ReasoningParser(self.thinking) if conversation.split_reasoning else None, tools)


class ChatPrompts:
    """Makes prompts for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        metadata: Mapping[str, object],
        source: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """source: a Jinja template instead of the metadata's. kwargs: variables that conversations may replace."""
        self._tokenizer, self._kwargs = tokenizer, kwargs or {}
        templates = [ChatTemplate.of(tokenizer, metadata, source) for _ in range(_RENDERERS)]
        self._free = [template for template in templates if template is not None]
        self._changed = threading.Condition()
        self.source = tokenizer.chat_template if source is None else source
        self._format = tool_format(self.source)
        self._control = {name: tokenizer.encode(name, parse_special=True) for name in self._format.marks}

    @property
    def has_template(self) -> bool:
        """Whether a template marks the messages; else a conversation is its messages' texts, one below the other."""
        return self.source is not None

    def prompt(self, conversation: Conversation) -> ChatPrompt:
        """The prompt of a conversation.

        Raises RequestError where its messages, tools or variables are malformed, or the template refuses them.
        """
        messages, begun = self._split(conversation)
        ids = self._ids(messages, conversation)
        thinking = self._opens_reasoning(ids) if begun is None else False
        if begun is not None and self._format.harmony:
            ids = ids + self._tokenizer.encode(OPENS_FINAL, parse_special=True, continuing=True)
        if begun is not None:
            ids = ids + self._tokenizer.encode(begun, continuing=True)
        grammar, marks = None, {}
        if conversation.tools or self._format.harmony:
            marks = {name: ids[0] for name, ids in self._control.items() if self._is_control(name, ids)}
        if conversation.tools:
            grammar = self._grammar(conversation, marks, thinking)
        named = frozenset(marks.values())
        return ChatPrompt(ids, thinking, conversation, self._format, grammar, named, begun=bool(begun))

    def text(self, conversation: Conversation) -> str:
        """The text that the template renders. Raises as `prompt` does."""
        messages, begun = self._split(conversation)
        with self._template() as template:
            if template is None:
                text = "\n".join(str(message.get("content") or "") for message in messages)
            else:
                with _request_errors():
                    variables = self._variables(conversation)
                    text = template.text(messages, variables, add_generation_prompt=conversation.begin_answer)
        return text + (OPENS_FINAL if begun is not None and self._format.harmony else "") + (begun or "")

    def close(self) -> None:
        """End the processes that render."""
        for template in self._free:
            template.close()

    def _split(self, conversation: Conversation) -> tuple[list[Message], str | None]:
        """The messages before the answer, and the beginning of the answer where the last message is that."""
        messages = [_for_templates(message) for message in checked_messages(conversation.messages)]
        last = messages[-1]
        begun = last["role"] == "assistant" and not last.get("tool_calls")
        if conversation.continues and not begun:
            raise RequestError("continue_final_message: the last message is not the assistant's")
        continues = begun and conversation.begin_answer if conversation.continues is None else conversation.continues
        if not continues:
            return messages, None
        if len(messages) > 1 and messages[-2]["role"] == "assistant":
            raise RequestError("the last two messages are the assistant's; give one to continue")
        return messages[:-1], last.get("content") or ""

    def _ids(self, messages: list[Message], conversation: Conversation) -> list[int]:
        with self._template() as template:
            if template is None:
                if conversation.tools:
                    raise RequestError("the model has no chat template, so nothing reads tools")
                text = "\n".join(str(message.get("content") or "") for message in messages)
                return self._tokenizer.encode(text, add_bos=self._tokenizer.add_bos)
            if not messages:
                raise RequestError("only the beginning of an answer is given; give a message before it")
            with _request_errors():
                variables = self._variables(conversation)
                return template.ids(messages, variables, add_generation_prompt=conversation.begin_answer)

    @contextmanager
    def _template(self) -> Iterator[ChatTemplate | None]:
        if self.source is None:
            yield None
            return
        with self._changed:
            while not self._free:
                self._changed.wait()
            template = self._free.pop()
        try:
            yield template
        finally:
            with self._changed:
                self._free.append(template)
                self._changed.notify()

    def _opens_reasoning(self, ids: Sequence[int]) -> bool:
        tail = b"".join(self._pieces[token] for token in ids[-_TAIL:]).decode("utf-8", "replace")
        return tail.rstrip().endswith(THINK)

    @property
    def _pieces(self) -> list[bytes]:
        if not hasattr(self, "_cached_pieces"):
            self._cached_pieces = self._tokenizer.pieces(special=True)
        return self._cached_pieces

    def _is_control(self, name: str, ids: Sequence[int]) -> bool:
        return len(ids) == 1 and not self._tokenizer.decode(ids) and self._tokenizer.token(ids[0]) == name

    def _variables(self, conversation: Conversation) -> TemplateVariables:
        tools = list(conversation.tools) if conversation.tools and conversation.tool_choice != "none" else None
        return TemplateVariables(tools, {**self._kwargs, **(conversation.kwargs or {})})

    def _grammar(self, conversation: Conversation, marks: Mapping[str, int], thinking: bool) -> str | None:
        choice, tools = conversation.tool_choice, list(conversation.tools)
        if choice in ("auto", "none"):
            return None
        if choice.startswith("function:"):
            name = choice.removeprefix("function:")
            tools = [tool for tool in tools if tool["function"]["name"] == name]
            if not tools:
                raise RequestError(f"tool_choice names {quoted(name)}, which is none of the tools")
        return self._format.grammar(tools, marks, thinking)


def _for_templates(message: Message) -> Message:
    """A message under the names that templates know."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


@contextmanager
def _request_errors() -> Iterator[None]:
    """A template that fails on a request's messages is that request's error, not the file's."""
    try:
        yield
    except FileFormatError as error:
        raise RequestError(str(error)) from None
