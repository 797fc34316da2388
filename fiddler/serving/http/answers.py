"""Answers to conversations as their tokens come, for every protocol that chats. Knows no protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fiddler.generation.events import Finished, Token
from fiddler.serving.answer_parts import Delta
from fiddler.serving.chat_prompts import ChatPrompt, Conversation
from fiddler.serving.http.jobs import Job, job_of
from fiddler.serving.http.progress import Progress
from fiddler.serving.http.service import Service, Texts
from fiddler.serving.json_fields import probs_of
from fiddler.serving.worker import Delivery

__all__ = ["Answer", "Call", "ChatJob", "chat_job", "collected"]


@dataclass
class Call:
    """A call of a tool; `arguments` are JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(frozen=True)
class ChatJob:
    """A conversation as texts to generate: several choices of one answer."""

    job: Job
    prompt: ChatPrompt
    unprefixed: bool  # the space that the tokenizer puts first is no part of an answer

    def answers(self) -> list[Answer]:
        """An empty answer for each text."""
        return [Answer(self) for _ in self.job.requests]


async def chat_job(service: Service, body: Mapping[str, Any], conversation: Conversation) -> ChatJob:
    """The job for a body and its conversation. Raises RequestError for what makes no sense."""
    prompt = await service.on_text(service.prompts.prompt, conversation)
    job = await job_of(service, body, [prompt.ids], grammar=prompt.grammar, named_tokens=prompt.named_tokens)
    unprefixed = service.prompts.has_template and service.engine.tokenizer.add_space_prefix and not prompt.begun
    return ChatJob(job, prompt, unprefixed)


class Answer:
    """One answer so far: `reasoning`, `content`, and `calls` of tools."""

    def __init__(self, job: ChatJob) -> None:
        self.progress = Progress()
        self.reasoning = self.content = ""
        self.calls: list[Call] = []
        self._parser, self._unprefixed, self._logged = job.prompt.parser(), job.unprefixed, 0
        self._trimmed = False  # whether the first space was left out

    def see(self, delivery: Delivery) -> list[Delta]:
        """Take in the next event: what the answer has more of."""
        self.progress.see(delivery)
        deltas: list[Delta] = []
        if isinstance(delivery.event, Token):
            text = delivery.event.text
            if text and self._unprefixed:
                self._unprefixed, self._trimmed = False, text.startswith(" ")
                text = text.removeprefix(" ")
            deltas = self._parser.push(text)
        elif isinstance(delivery.event, Finished):
            deltas = self._parser.finish()
        for delta in deltas:
            self._add(delta)
        return deltas

    @property
    def finish_reason(self) -> str:
        """OpenAI's: "stop", "length" or "tool_calls". The answer has ended."""
        assert self.progress.completion is not None
        reason = self.progress.completion.finish_reason
        return "tool_calls" if self.calls and reason == "stop" else reason

    def log_probs(self, pieces: Sequence[bytes]) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens since the last call, as OpenAI's API has them."""
        first, self._logged = self._logged, len(self.progress.probs)
        entries = [probs_of(pieces, step) for step in self.progress.probs[first:]]
        if entries and first == 0 and self._trimmed:  # the tokens' texts add up to the answer's
            entries[0]["token"] = entries[0]["token"].removeprefix(" ")
            entries[0]["bytes"] = [*bytes(entries[0]["bytes"]).removeprefix(b" ")]
        return entries

    def _add(self, delta: Delta) -> None:
        if delta.kind == "reasoning":
            self.reasoning += delta.text
        elif delta.kind == "content":
            self.content += delta.text
        elif delta.kind == "call":
            self.calls.append(Call(delta.id, delta.text))
        else:
            self.calls[delta.index].arguments += delta.text


async def collected(texts: Texts, answers: Sequence[Answer]) -> None:
    """Take in all events of all texts."""
    async for delivery in texts:
        answers[delivery.number].see(delivery)
