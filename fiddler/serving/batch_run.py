"""A batch's lines as generations. Knows an engine and its chat template; no files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.engine import Engine
    from fiddler.generation.completion import Generation
    from fiddler.serving.json_fields import Id, Job
    from fiddler.text.chat_template import ChatTemplate

__all__ = ["Prompts"]


class Prompts:
    """What lines ask for, as generations."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._template: ChatTemplate | None = None
        self._answers: set[Id] = set()

    def start(self, job: Job) -> Generation:
        """Raises FiddlerError where the line cannot run: too long, or messages that the model's template refuses."""
        prompt: str | list[int]
        if isinstance(job.prompt, str):
            prompt = job.prompt
        else:
            prompt = self._chat().ids(job.prompt)
            self._answers.add(job.id)
        return self._engine.start(prompt, job.sampling, job.max_tokens, stop=job.stop, ignore_eos=job.ignore_eos)

    def shown(self, identity: Id, text: str) -> str:
        """A result's text. As in a chat, the tokenizer's own space before an answer is left out."""
        if identity in self._answers and self._engine.tokenizer.add_space_prefix:
            return text.removeprefix(" ")
        return text

    def _chat(self) -> ChatTemplate:
        if self._template is None:
            from fiddler.text.chat_template import ChatTemplate

            file = self._engine.model_file.file
            self._template = ChatTemplate.of(self._engine.tokenizer, file.metadata)
        if self._template is None:
            raise RequestError("this model has no chat template; give a prompt instead of messages")
        return self._template
