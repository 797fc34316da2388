"""Which beams live, which are finished, and when a beam search is over: pure, numpy only.

The rules, and so the results, are those of transformers' `generate(num_beams=N, do_sample=False)` (`_beam_search` in
its `generation/utils.py`, version 5). The best continuations, a few times `num_beams`, are candidates. Candidates among
the first `num_beams` that end are finished; the first `num_beams` candidates that do not end live on. A score is the
sum of log-probabilities divided by (generated tokens) ** length_penalty, the end token counted. Knows no model, no text
and no cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal, NamedTuple

import numpy as np

from fiddler.errors import RequestError, ResourceError, quoted
from fiddler.sampling.logprobs import largest

__all__ = ["BeamOptions", "EarlyStopping", "Finished", "Hypotheses", "Live", "best"]

_MOST_BEAMS = 1 << 20  # as the largest vocabulary has tokens
_BYTES_A_LOGIT = 24  # of a beam: its logits in float32, log-probabilities and totals in float64

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamOptions:
    """Options of a beam search. Raises RequestError when a value is out of range.

    `length_penalty`: above 0 favours long texts, below 0 short ones. `early_stopping`: True ends the search as soon as
    `num_beams` beams are finished; False when the best living beam, if it ended now, would not be better than the worst
    finished one; "never" when it would not be at any length. As in transformers, one beam is always a greedy search.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    def __post_init__(self) -> None:
        whole = isinstance(self.num_beams, Integral) and not isinstance(self.num_beams, bool)
        if not whole or not 1 <= self.num_beams <= _MOST_BEAMS:
            raise RequestError(
                f"{quoted(self.num_beams)} beams; give a whole number of at least 1 and at most {_MOST_BEAMS}"
            )
        # beyond 50 nothing but the length counts
        number = isinstance(self.length_penalty, Real) and not isinstance(self.length_penalty, bool)
        if not number or not abs(self.length_penalty) <= 50:
            raise RequestError(f"length_penalty is {quoted(self.length_penalty)}; give -50 to 50")
        early = self.early_stopping
        if not isinstance(early, bool | str) or (isinstance(early, str) and early != "never"):
            raise RequestError(f"early_stopping is {quoted(self.early_stopping)}; give True, False or 'never'")

    def check(self, vocab_size: int, kv_bytes: int, room: int | None) -> None:
        """Raise RequestError for more beams than tokens, ResourceError where not even their first step has memory.

        kv_bytes: of one beam after its first token; room: bytes for all of them, None for no limit.
        """
        if self.num_beams > vocab_size:
            raise RequestError(f"{self.num_beams} beams; the vocabulary has {vocab_size} tokens: give at most as many")
        needed = self.num_beams * (kv_bytes + _BYTES_A_LOGIT * vocab_size)
        if self.num_beams > 1 and room is not None and needed > room:
            raise ResourceError(
                f"{self.num_beams} beams need {needed / 2**30:.1f} GiB at least, and {room / 2**30:.1f} GiB are "
                "available; give fewer"
            )


class Live(NamedTuple):
    """A living beam. `parent`: index of the beam that it continues among those that lived a step before."""

    tokens: tuple[int, ...]
    total: float  # of log-probabilities
    parent: int


class Finished(NamedTuple):
    """A beam that has ended, by its last token or at the limit."""

    tokens: tuple[int, ...]
    score: float


class Hypotheses:
    """The state of one search over texts of at most `limit` tokens, at least 1.

    ends: decides for a beam in `live`, by its index, and one more token whether that ends it.
    end_count: number of tokens that end any beam: enough candidates are then left that do not end.
    """

    def __init__(self, options: BeamOptions, limit: int, ends: Callable[[int, int], bool], end_count: int) -> None:
        assert limit >= 1
        self._options, self._limit, self._ends = options, limit, ends
        self._candidates = max(2, 1 + end_count) * options.num_beams
        self.live = [Live((), 0.0, 0)]
        self.finished: list[Finished] = []  # best first, at most `num_beams`
        self.over = False

    def advance(self, log_probs: np.ndarray) -> None:
        """Extend the beams in `live` by one token: log_probs float64 [len(live), V], -inf where a token is banned."""
        assert not self.over
        num_beams, before = self._options.num_beams, self.live
        length = len(before[0].tokens) + 1
        totals = log_probs + np.array([beam.total for beam in before])[:, None]
        ended: list[Finished] = []
        self.live = []
        for rank, (parent, token) in enumerate(best(totals, self._candidates)):
            total = float(totals[parent, token])
            tokens = (*before[parent].tokens, token)
            if length < self._limit and not self._ends(parent, token):
                if len(self.live) < num_beams:
                    self.live.append(Live(tokens, total, parent))
            elif rank < num_beams:
                ended.append(Finished(tokens, self._score(total, length)))
        # the sort is stable: of equal scores the earlier one comes first
        self.finished = sorted(self.finished + ended, key=lambda beam: -beam.score)[:num_beams]
        self.over = not self.live or (len(self.finished) == num_beams and not self._may_improve(length))

    def _may_improve(self, length: int) -> bool:
        """Whether the best living beam, `length` tokens long, could replace one of `num_beams` finished ones.

        Its score counts at the length that is best for it: for "never" and a penalty above 0 the limit, else its own.
        """
        early, penalty = self._options.early_stopping, self._options.length_penalty
        if early is True or self._options.num_beams == 1:
            return False
        if early == "never" and penalty > 0:
            length = self._limit
        return self._score(self.live[0].total, length) > self.finished[-1].score

    def _score(self, total: float, length: int) -> float:
        return total / math.pow(length, self._options.length_penalty)


def best(totals: np.ndarray, count: int) -> list[tuple[int, int]]:
    """(row, column) of the `count` largest values above -inf: largest first, of equal values the lower index first."""
    flat = totals.reshape(-1)
    return [divmod(int(index), totals.shape[1]) for index in largest(flat, count) if flat[index] > -math.inf]
