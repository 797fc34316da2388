"""Choosing the next token: pure functions on logits, with llama.cpp's names, defaults and order.

Order: the constraint's mask, logit biases, penalties, DRY (`penalties.py`), then the filters top-k, typical, top-p,
min-p, XTC; temperature last (`common_params_sampling` and `llama-sampler.cpp` in
https://github.com/ggml-org/llama.cpp). Knows no model and no text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Protocol

import numpy as np

from fiddler.errors import RequestError, quoted
from fiddler.sampling.logprobs import LogProbs, largest, log_probs
from fiddler.sampling.penalties import add_bias, lately, penalize_repeats, penalize_runs

__all__ = ["Guide", "Sampler", "Sampling", "min_p", "pick", "top_k", "top_p", "typical", "xtc"]

_MOST_BREAKERS = 1024  # each is searched at every step


@dataclass(frozen=True)
class Sampling:
    """Options of sampling. Raises RequestError when a value is not a number or out of range.

    `temperature` 0: the most probable token after biases and penalties, the lowest id among equals; nothing else
    counts, nothing is drawn. `top_k` 0 or less, `top_p` 1, `min_p` 0, `typical_p` 1, `repeat_penalty` 1,
    `presence_penalty` 0, `frequency_penalty` 0, `dry_multiplier` 0, `xtc_probability` 0: off. `repeat_last_n`,
    `dry_penalty_last_n`: how many of the last tokens the penalties or DRY look at, the prompt's included; 0 for none,
    -1 for all. `dry_sequence_breakers`: texts that a repeated run never reaches over. `logit_bias`: by token id, added
    before anything else; -inf bans a token. `n_probs`: number of log-probabilities to record at
    every step. `seed` None: a new one each time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = 64
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    n_probs: int = 0

    def __post_init__(self) -> None:
        for name, kind, low, high in (
            ("temperature", Real, 0.0, math.inf),
            ("top_k", Integral, -math.inf, math.inf),
            ("top_p", Real, 0.0, 1.0),
            ("min_p", Real, 0.0, 1.0),
            ("repeat_penalty", Real, 1e-6, 1e6),  # beyond it a token is certain or impossible
            ("repeat_last_n", Integral, -1, math.inf),
            ("seed", Integral, 0, 2**64 - 1),
            ("typical_p", Real, 0.0, 1.0),
            ("presence_penalty", Real, -1e6, 1e6),
            ("frequency_penalty", Real, -1e6, 1e6),
            ("dry_multiplier", Real, 0.0, 1e6),
            ("dry_base", Real, 1.0, 1e6),
            ("dry_allowed_length", Integral, 0, math.inf),
            ("dry_penalty_last_n", Integral, -1, math.inf),
            ("xtc_probability", Real, 0.0, 1.0),
            ("xtc_threshold", Real, 0.0, 1.0),
            ("n_probs", Integral, 0, math.inf),
        ):
            value = getattr(self, name)
            if name != "seed" or value is not None:
                object.__setattr__(self, name, _number(name, value, kind, low, high))
        breakers, bias = self.dry_sequence_breakers, self.logit_bias
        if not isinstance(breakers, list | tuple) or not all(isinstance(text, str) and text for text in breakers):
            raise RequestError(
                f"dry_sequence_breakers is {quoted(breakers)}; it must be a list of texts, none of them empty"
            )
        if len(breakers) > _MOST_BREAKERS:
            raise RequestError(f"dry_sequence_breakers has {len(breakers)} texts; give at most {_MOST_BREAKERS}")
        object.__setattr__(self, "dry_sequence_breakers", tuple(breakers))
        if not isinstance(bias, Mapping):
            raise RequestError(f"logit_bias is {quoted(bias)}; it must map token ids to numbers")
        biases: dict[int, float] = {}
        for token, value in bias.items():
            if not isinstance(token, Integral) or isinstance(token, bool) or token < 0:
                raise RequestError(f"logit_bias is for {quoted(token)}; it must be for a token id, 0 or more")
            if not isinstance(value, Real) or isinstance(value, bool) or not (abs(value) <= 1e6 or value == -math.inf):
                raise RequestError(
                    f"logit_bias is {quoted(value)} for token {quoted(token)}; it must lie between -1e6 and 1e6, or be "
                    "-inf"
                )
            biases[int(token)] = float(value)
        object.__setattr__(self, "logit_bias", biases)


def _is_greedy(s: Sampling) -> bool:
    """See `Sampler.greedy`."""
    changed = s.repeat_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.dry_multiplier
    return s.temperature == 0 and all(value == -math.inf for value in s.logit_bias.values()) and not changed


def _number(name: str, value: object, kind: type, low: float, high: float) -> int | float:
    """`value` as an int or a float. Raises RequestError where it is none, or not between `low` and `high`."""
    if isinstance(value, bool) or not isinstance(value, kind):
        whole = "whole " if kind is Integral else ""
        raise RequestError(f"{name} is {quoted(value)}; it must be a {whole}number")
    try:
        number = int(value) if isinstance(value, Integral) else float(value)  # type: ignore[arg-type]
        finite = kind is Integral or math.isfinite(number)
    except OverflowError:
        finite = False
    if not finite:
        raise RequestError(f"{name} is {quoted(value)}; it must be finite")
    if not low <= number <= high:
        raise RequestError(f"{name} is {quoted(value)}; it must lie between {low} and {high}")
    return number


class Guide(Protocol):
    """The state of a constraint, as a sampler uses it; see `constraint.py`."""

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next: bool [V]."""

    def advance(self, token: int) -> None:
        """Advance the state by the chosen `token`."""


class Sampler:
    """A `Sampling` with its state: one a generation. `log_probs`: of every step, where `n_probs` is above 0.

    `greedy`: whether it always chooses the token of the model's largest logit, unless that is banned.
    """

    def __init__(self, sampling: Sampling, pieces: Sequence[bytes] = (), guide: Guide | None = None) -> None:
        """`pieces`: each token's text as bytes, by id; DRY looks for its breakers there. `guide`: a constraint.

        Raises RequestError where DRY has breakers and there are no pieces.
        """
        self.sampling = sampling
        self.greedy = guide is None and _is_greedy(sampling)
        self.log_probs: list[LogProbs] = []
        self._random = np.random.default_rng(sampling.seed)
        self._pieces, self._guide = pieces, guide
        self._breakers = [text.encode("utf-8", "surrogatepass") for text in sampling.dry_sequence_breakers]
        if sampling.dry_multiplier and self._breakers and not pieces:
            raise RequestError("DRY's sequence breakers need the tokenizer's pieces: make the sampler with an engine's")

    @property
    def finished(self) -> bool:
        """Whether a constraint is met and nothing but an end token may follow; without one never."""
        return self._guide is not None and self._guide.finished

    def __call__(self, logits: np.ndarray, recent: Sequence[int], largest: int = -1) -> int:
        """Choose a token from logits [V], after the `recent` tokens; -inf is never chosen.

        largest: the first token of the largest logit, where that is known: a greedy choice then costs nothing.
        The largest of the logits must be finite, and none of them NaN. Raises RequestError where the constraint and
        the biases leave no token.
        """
        model_logits = logits
        if self.greedy and largest >= 0 and largest not in self.sampling.logit_bias:
            token = largest
        else:
            if self._guide is not None:
                logits = np.where(self._guide.allowed(), logits, -np.inf)
            token = self._choose(add_bias(logits, self.sampling.logit_bias), recent)
        if self.sampling.n_probs:
            self.log_probs.append(log_probs(model_logits, token, self.sampling.n_probs))
        if self._guide is not None:
            self._guide.advance(token)
        return token

    def _choose(self, logits: np.ndarray, recent: Sequence[int]) -> int:
        s = self.sampling
        last = lately(recent, s.repeat_last_n)
        logits = penalize_repeats(logits, last, s.repeat_penalty, s.presence_penalty, s.frequency_penalty)
        if s.dry_multiplier:
            last = lately(recent, s.dry_penalty_last_n)
            logits = penalize_runs(
                logits, last, s.dry_multiplier, s.dry_base, s.dry_allowed_length, self._pieces, self._breakers
            )
        best = int(logits.argmax())
        if logits[best] == -np.inf:
            raise RequestError(
                "no token is left: the logit biases forbid all that could follow; take some of them back"
            )
        if s.temperature == 0:
            return best
        ids = top_k(logits, s.top_k)
        ids = ids[logits[ids] > -np.inf]
        ids = typical(logits, ids, s.typical_p)
        ids = top_p(logits, ids, s.top_p)
        ids = min_p(logits, ids, s.min_p)
        if s.xtc_probability and self._random.random() < s.xtc_probability:
            ids = xtc(logits, ids, s.xtc_threshold)
        return int(ids[pick(_weights(logits[ids], s.temperature), self._random.random())])


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest logits, largest first, lower id first among equals; all of them for k <= 0."""
    return largest(logits, k if k > 0 else logits.size)


def typical(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """Of `ids` (largest logit first) those whose surprise, -log of the probability among them, is nearest to the
    expected surprise, the entropy: the fewest whose probability exceeds p (Meister et al. 2022, "Locally typical
    sampling"). The most probable one may be left out.
    """
    if p >= 1.0:
        return ids
    weights = _weights(logits[ids])
    total = weights.sum()
    surprise = math.log(total) - _below_first(logits[ids])
    order = np.argsort(np.abs(surprise - weights @ surprise / total), kind="stable")
    cumulative = np.cumsum(weights[order])
    return ids[np.sort(order[: int(np.searchsorted(cumulative, p * cumulative[-1], side="right")) + 1])]


def top_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """The fewest of `ids` (largest logit first) whose probability among them reaches p; at least one."""
    if p >= 1.0:
        return ids
    cumulative = np.cumsum(_weights(logits[ids]))
    return ids[: min(int(np.searchsorted(cumulative, p * cumulative[-1])) + 1, ids.size)]


def min_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """Those of `ids` (largest logit first) at least p times as probable as the first."""
    if p <= 0.0:
        return ids
    return ids[_below_first(logits[ids]) >= math.log(p)]


def xtc(logits: np.ndarray, ids: np.ndarray, threshold: float) -> np.ndarray:
    """Exclude top choices: of those of `ids` (largest logit first) that are at least `threshold` probable among them,
    only the last stays. The caller draws whether it applies, with `xtc_probability`.
    """
    weights = _weights(logits[ids])
    return ids[max(int(np.count_nonzero(weights >= threshold * weights.sum())) - 1, 0) :]


def pick(weights: np.ndarray, uniform: float) -> int:
    """The index in `weights`, not all 0, that `uniform`, of [0, 1), falls on; never one whose weight is 0."""
    cumulative = np.cumsum(weights)
    # `uniform` is at most 1 - 2**-53, so the product is rounded to less than the sum: an index where the sum grows
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


def _weights(values: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of `values` (largest first) before division by their sum: float64, the first is 1."""
    with np.errstate(over="ignore"):  # a temperature close to 0 makes them -inf, which is right
        weights: np.ndarray = np.exp(_below_first(values) / temperature)
    return weights


def _below_first(values: np.ndarray) -> np.ndarray:
    difference: np.ndarray = values.astype(np.float64) - float(values[0])
    return difference
