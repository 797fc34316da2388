"""What may be asked of a model: token ids that it has, prompts and new tokens that its context has room for. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fiddler.errors import RequestError
from fiddler.tokenizer import Tokenizer

__all__ = ["Room", "checked_request"]


@dataclass(frozen=True)
class Room:
    """A vocabulary of so many tokens, a context of so many positions, and how many the model was trained with."""

    vocabulary: int
    context: int
    trained: int

    def checked(self, ids: Sequence[int]) -> list[int]:
        """`ids` as they are. Raises RequestError for one outside the vocabulary, or more than the context holds."""
        ids = [int(token) for token in ids]
        bad = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.vocabulary}")
        if len(ids) > self.context:
            raise RequestError(f"{len(ids)} tokens exceed the context of {self.context}; shorten them ({self.remedy})")
        return ids

    @property
    def remedy(self) -> str:
        """What helps where there is too little context."""
        most = self.trained
        return f"or raise --ctx, up to {most}" if self.context < most else "the model was trained with no more"


def checked_request(
    prompt: str | Sequence[int], max_tokens: int | None, stop: Sequence[str], tokenizer: Tokenizer, room: Room
) -> tuple[list[int], int]:
    """The prompt's ids, and the most tokens that may follow; arguments and errors as of `Engine.start`."""
    ids = room.checked(tokenizer.encode(prompt, add_bos=tokenizer.add_bos) if isinstance(prompt, str) else prompt)
    if not ids:
        raise RequestError("the prompt is empty and this model adds no BOS token; give some text")
    if max_tokens is not None and max_tokens < 0:
        raise RequestError(f"max_tokens is {max_tokens}; give 0 or more, or none for no limit")
    left = room.context - len(ids)
    if max_tokens is not None and max_tokens > left:
        raise RequestError(
            f"{len(ids)} prompt tokens and {max_tokens} new ones exceed the context of {room.context}; "
            f"ask for at most {left} ({room.remedy})"
        )
    if left == 0 and max_tokens is None:
        raise RequestError(f"{len(ids)} prompt tokens fill the context of {room.context} ({room.remedy})")
    if any(not text for text in stop):
        raise RequestError("a stop string is empty; give at least one character")
    return ids, left if max_tokens is None else max_tokens
