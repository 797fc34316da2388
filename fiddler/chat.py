"""A conversation with a loaded model: its messages, prompts that fit the context, answers as they come.

A model with a chat template gets the messages as the template writes them. A model without one gets plain text, all
messages with a line break between one and the next, and continues it. Knows no terminal and no files.

A prompt must leave a quarter of the context for the answer, or `max_tokens` where that is less. Where it does not, the
oldest turns (a message and its answer) are left out of this and all later prompts, until the prompt is no more than
half of the context: so turns are not dropped, and the rest is not computed anew, at every turn. The system message and
the new one always stay; a new one that does not fit even then is refused. `messages` has the whole conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fiddler.engine import Engine
from fiddler.errors import RequestError, quoted
from fiddler.generation.completion import Completion
from fiddler.generation.request import Request, check_text
from fiddler.generation.sampled_text import Generation
from fiddler.sampling.constraint import Constraint
from fiddler.sampling.sampler import Sampling
from fiddler.text.chat_template import ChatTemplate
from fiddler.text.harmony import is_harmony
from fiddler.text.harmony_turn import HarmonyTurn, named_marks
from fiddler.text.messages import Message, checked_messages
from fiddler.text.template_variables import TemplateVariables

__all__ = ["Chat"]

_PROBE: Message = {"role": "user", "content": "Hello"}


class Chat:
    """A system message, if any, and turns of the user and the model. Not for several threads at once."""

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        *,
        template: str | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        constraint: Constraint | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """`max_tokens`: of an answer; None for all that the context leaves. `template`: Jinja, in place of the model's.
        `constraint`: of every answer. `tools`: functions that the model may call, as in OpenAI's API.
        `chat_template_kwargs`: variables of the template, as `{"enable_thinking": False}`.

        Raises FileFormatError where the template cannot be used, RequestError where it takes no system message, or
        where there is none for `tools` and `chat_template_kwargs`.
        """
        for name, value in (("the system message", system), ("the template", template)):
            if not isinstance(value, str | None):
                raise RequestError(f"{name} is {quoted(value)}; give a text")
        if not isinstance(engine, Engine):
            raise RequestError(f"the engine is {quoted(engine)}; give what fiddler.load returns")
        source = engine.tokenizer.chat_template if template is None else template
        self._harmony = is_harmony(source)
        named = named_marks(engine.tokenizer) if self._harmony else frozenset()
        sampling = Sampling() if sampling is None else sampling
        request = Request("", sampling, max_tokens, stop, ignore_eos, constraint, named_tokens=named)
        self._request = request  # of every answer
        self._engine, self._max_tokens = engine, request.max_tokens
        self._template = ChatTemplate.of(engine.tokenizer, engine.model_file.file.metadata, template)
        self._variables = TemplateVariables(tools, {} if chat_template_kwargs is None else chat_template_kwargs)
        self._system: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []  # messages of the user and of the model, alternating
        self._first = 0  # index of the first of them that prompts still hold
        self._check_system()
        self.on_chunk: Callable[[int], None] = lambda read: None  # see `Engine.start`
        self.context_used = 0  # positions, after the last answer
        self.completion: Completion | None = None  # of the last answer, unless it was cancelled

    @property
    def has_template(self) -> bool:
        """Whether a template marks the messages; else the conversation is one text."""
        return self._template is not None

    @property
    def merges_system(self) -> bool:
        """Whether the template refuses a system message, which therefore stands in the first user message."""
        return self._template is not None and self._template.merges_system

    @property
    def context(self) -> int:
        """Positions of the context."""
        return self._engine.context

    @property
    def messages(self) -> list[Message]:
        """All messages, the system message first."""
        return [*self._system, *self._turns]

    @property
    def left_out(self) -> int:
        """Turns that prompts no longer hold."""
        return self._first // 2

    def send(self, text: str | Message) -> Iterator[str]:
        """The answer to `text`, as pieces of text, computed as the caller iterates.

        text: of the user; or a message, as `{"role": "tool", "content": ...}` with what a called tool returned.
        If the iterator is closed before its end, the pieces so far are the answer; if there are none, `text` is
        forgotten as well, and the conversation is as before. Where there is a template, one space at an answer's
        beginning is left out: it belongs to the tokenizer. `HarmonyTurn` says what an answer in harmony shows. Raises
        RequestError at once for a message that is too long, or that the template refuses.
        """
        if not isinstance(text, str | Mapping):
            raise RequestError(f"the message is {quoted(text)}; give a text")
        message: Message = {"role": "user", "content": text} if isinstance(text, str) else checked_messages([text])[0]
        engine = self._engine
        check_text("the message", message.get("content") or "", engine.tokenizer, engine.config, engine.context)
        first, ids = self._prompt(message)
        available = self._engine.context - len(ids)
        limit = available if self._max_tokens is None else min(available, self._max_tokens)
        request = replace(self._request, prompt=ids, max_tokens=limit)
        generation = self._engine.start(request, on_chunk=self.on_chunk)
        return self._answer(message, first, len(ids), generation)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns, self._first = [], 0
        self.completion, self.context_used = None, 0

    def close(self) -> None:
        """End the process that renders the template, which a later `send` starts again."""
        if self._template is not None:
            self._template.close()

    def _answer(self, message: Message, first: int, prompt_tokens: int, generation: Generation) -> Iterator[str]:
        pieces: list[str] = []
        turn = HarmonyTurn() if self._harmony else None
        unprefixed = self._template is not None and self._engine.tokenizer.add_space_prefix
        self.completion = None
        try:
            for piece in generation:
                if unprefixed:
                    piece, unprefixed = piece.removeprefix(" "), False
                if piece:
                    pieces.append(piece)
                    shown = piece if turn is None else turn.push(piece)
                    if shown:
                        yield shown
            self.completion = generation.completion
            if turn is not None and (shown := turn.finish()):
                yield shown
        finally:
            if pieces:
                answer = "".join(pieces)
                self._first = first
                self._turns += [message, {"role": "assistant", "content": answer} if turn is None else turn.message]
                count = len(self._engine.tokenizer.encode(answer)) if self.completion is None else 0
                self.context_used = prompt_tokens + (count if self.completion is None else len(self.completion.tokens))

    def _prompt(self, new: Message) -> tuple[int, list[int]]:
        """The index of the first message that the prompt holds, and the prompt's ids."""
        context = self._engine.context
        reserved = max(1, context // 4)
        reserved = reserved if self._max_tokens is None else min(reserved, self._max_tokens)
        first = self._first
        ids = self._ids([*self._system, *self._turns[first:], new])
        if len(ids) + reserved <= context:
            return first, ids
        while first < len(self._turns) and len(ids) > context // 2:
            first += 2
            ids = self._ids([*self._system, *self._turns[first:], new])
        if len(ids) + reserved > context:
            maximum = self._engine.config.context_length
            remedy = f", or raise --ctx, up to {maximum}" if context < maximum else ""
            raise RequestError(
                f"the message makes a prompt of {len(ids)} tokens, which leaves less than {reserved} of the context of "
                f"{context} for an answer; shorten it{remedy}"
            )
        return first, ids

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        if self._template is not None:
            return self._template.ids(messages, self._variables)
        tokenizer = self._engine.tokenizer
        return tokenizer.encode("\n".join(message["content"] for message in messages), add_bos=tokenizer.add_bos)

    def _check_system(self) -> None:
        """Raise at construction the errors that every message would raise."""
        if self._template is None:
            if self._system:
                raise RequestError("the model has no chat template, so there is no place for a system message")
            if self._variables != TemplateVariables():
                raise RequestError("the model has no chat template, so nothing reads tools or chat_template_kwargs")
            return
        self._template.ids([_PROBE], self._variables)
        self._template.ids([*self._system, _PROBE], self._variables)
