"""Events of requests that a scheduler runs: what each of its steps gave. Each names its request by its handle."""

from __future__ import annotations

from dataclasses import dataclass

from fiddler.errors import FiddlerError
from fiddler.generation.completion import BeamResult, Completion
from fiddler.sampling.logprobs import LogProbs

__all__ = ["Event", "Failed", "Finished", "Joined", "PromptRead", "Result", "Token"]

Result = Completion | BeamResult


@dataclass(frozen=True, slots=True)
class Joined:
    """A request has memory and takes part in the next step. `cached` of its prompt's `total` tokens need no computing.

    It comes again where a request gave its memory back meanwhile.
    """

    handle: int
    cached: int
    total: int


@dataclass(frozen=True, slots=True)
class PromptRead:
    """A step read tokens of a prompt: `read` of all its `total` tokens are in the KV cache now, reused ones included.

    It comes again where a request gave its memory back and reads its prompt a second time.
    """

    handle: int
    read: int
    total: int


@dataclass(frozen=True, slots=True)
class Token:
    """A request's text has a new token. `text`: what is certain because of it, maybe empty; whole characters only.

    `log_probs`: where the sampling's `n_probs` is above 0.
    """

    handle: int
    token: int
    text: str
    log_probs: LogProbs | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended and left the scheduler. `result`: a `Completion`, or a `BeamResult` of a beam search."""

    handle: int
    result: Result


@dataclass(frozen=True, slots=True)
class Failed:
    """A request cannot go on and left the scheduler; others are not affected."""

    handle: int
    error: FiddlerError


Event = Joined | PromptRead | Token | Finished | Failed
