"""Sequences that a scheduler steps, in groups: all of one request, which advance together. Knows no model and no text.

A sampled text is a group of one sequence. A beam search is a group with a sequence for each living beam.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.generation.events import Result
from fiddler.runtime.kv_cache import KVCache
from fiddler.sampling.logprobs import LogProbs

__all__ = ["Advance", "Fork", "PreparedRequest", "RunningSequence", "SequenceGroup", "finite"]


class RunningSequence:
    """Tokens so far; `cache`, if any, holds the first of them, and the next steps compute the others.

    `logits`: float32 [V] after the last token, once all are computed; None while some are not. `largest`: see
    `StepOutput`; -1, too, where it is not known. `greedy`: the token after `tokens` will be that of the largest logit,
    and others will follow it, if the text goes on.
    """

    __slots__ = ("cache", "greedy", "largest", "logits", "tokens")

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.greedy, self.largest = False, -1
        self.cache: KVCache | None = None
        self.logits: np.ndarray | None = None

    @property
    def lacking(self) -> int:
        """Number of tokens that are not computed yet: one while it decodes, many of a prompt."""
        assert self.cache is not None, "the sequence has no KV cache"
        return len(self.tokens) - self.cache.length


class Fork(NamedTuple):
    """`target` continues `source`: it needs a copy of its KV cache. The first `shared` positions are there already."""

    source: RunningSequence
    target: RunningSequence
    shared: int


class Advance(NamedTuple):
    """How a group goes on. `token`, `text`, `log_probs`: see `Token`, where it is one text.

    `result`: None until the group has ended.
    """

    token: int | None = None
    text: str = ""
    log_probs: LogProbs | None = None
    forks: Sequence[Fork] = ()
    result: Result | None = None


class SequenceGroup(Protocol):
    """The sequences of one request.

    `reuse`: whether the prompt may begin with a cached prefix. `interactive`: someone waits for each token.
    `max_sequences`, and `max_positions` of each of them, are limits for its whole life. `sequences`: those that run.
    `free`: dropped ones, whose caches a fork may take.
    """

    prompt: Sequence[int]
    reuse: bool
    interactive: bool
    max_positions: int
    max_sequences: int
    sequences: list[RunningSequence]
    free: list[RunningSequence]

    def joined(self, cached: int) -> None:
        """It gets its first step now. cached: tokens of the prompt that need not be computed."""
        ...

    def advance(self) -> Advance:
        """Choose the next tokens, from the `logits` of all its sequences, and append them.

        Raises FiddlerError where the request cannot go on; see `finite` for one reason.
        """
        ...


class PreparedRequest(Protocol):
    """A checked and prepared request; it may be run several times."""

    def begin(self) -> SequenceGroup:
        """A new group, with the prompt as its only sequence."""
        ...


def finite(logits: np.ndarray, position: int) -> np.ndarray:
    """`logits`, if all are finite; else raises FileFormatError. `position`: number of tokens before them."""
    if not (math.isfinite(logits.max()) and math.isfinite(logits.min())):  # either is NaN where one of them is
        raise FileFormatError(
            f"the model computes {logits[~np.isfinite(logits)][0]} after {position} tokens: a weight is NaN or "
            "infinite, or an activation is beyond 16 bits; try --precision exact, or convert again as bf16"
        )
    return logits
