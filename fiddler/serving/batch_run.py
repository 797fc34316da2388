"""Starts a batch's jobs as generations. Knows an engine and its chat template; no files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.sampled_text import Generation
    from fiddler.serving.json_fields import Id, Job
    from fiddler.text.chat_template import ChatTemplate

__all__ = ["Prompts"]


class Prompts:
    """Starts jobs on one engine, those with messages through its chat template."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._template: ChatTemplate | None = None
        self._chat_ids: set[Id] = set()

    @property
    def merges_system(self) -> bool:
        """Whether the chat template refused a system message so far, which went into the first user message."""
        return self._template is not None and self._template.merges_system

    def start(self, job: Job) -> Generation:
        """A job's generation. Raises FiddlerError for a prompt too long, or messages that the chat template refuses."""
        request = job.request
        if job.messages:
            request = replace(request, prompt=self._chat_template().ids(job.messages, job.variables))
            self._chat_ids.add(job.id)
        return self._engine.start(request)

    def text_of(self, identity: Id, text: str) -> str:
        """A result's text. As in a chat, an answer to messages loses the space that the tokenizer puts first."""
        if identity in self._chat_ids and self._engine.tokenizer.add_space_prefix:
            return text.removeprefix(" ")
        return text

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            from fiddler.text.chat_template import ChatTemplate

            file = self._engine.model_file.file
            self._template = ChatTemplate.of(self._engine.tokenizer, file.metadata)
        if self._template is None:
            raise RequestError("this model has no chat template; give a prompt instead of messages")
        return self._template
