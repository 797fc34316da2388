"""Choosing the next token: pure functions on logits, with llama.cpp's names, defaults and order.

Order: repeat penalty, top-k, top-p, min-p, temperature last (`common_params_sampling` and `llama-sampler.cpp` in
https://github.com/ggml-org/llama.cpp). Knows no model and no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from fiddler.errors import RequestError

__all__ = ["Sampler", "Sampling", "min_p", "penalize_repeats", "pick", "top_k", "top_p"]


@dataclass(frozen=True)
class Sampling:
    """How to choose. Raises RequestError when a value is not a number or out of range.

    `temperature` 0: the most probable token, the lowest id among equals. `top_k` 0 or less, `top_p` 1, `min_p` 0,
    `repeat_penalty` 1, `repeat_last_n` 0: off. `repeat_last_n`: how many of the last tokens are penalised, the
    prompt's included; -1 for all. `seed` None: a new one each time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, low, high in (
            ("temperature", Real, 0.0, math.inf),
            ("top_k", Integral, -math.inf, math.inf),
            ("top_p", Real, 0.0, 1.0),
            ("min_p", Real, 0.0, 1.0),
            ("repeat_penalty", Real, 1e-6, 1e6),  # beyond it a token is certain or impossible
            ("repeat_last_n", Integral, -1, math.inf),
            ("seed", Integral, 0, 2**64 - 1),
        ):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            is_number = isinstance(value, kind)
            if not is_number:
                raise RequestError(f"{name} is {value!r}; it must be a {'whole ' if kind is Integral else ''}number")
            if not low <= value <= high or abs(value) == math.inf:
                raise RequestError(f"{name} is {value}; it must lie between {low} and {high}")


class Sampler:
    """A `Sampling` with its random state: one a generation."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, recent: Sequence[int]) -> int:
        """Choose a token from logits [V], given the tokens so far; -inf is never chosen.

        The largest of the logits must be finite, and none of them NaN.
        """
        s = self.sampling
        last = recent if s.repeat_last_n < 0 else recent[len(recent) - min(len(recent), s.repeat_last_n) :]
        logits = penalize_repeats(logits, last, s.repeat_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        ids = top_k(logits, s.top_k)
        ids = top_p(logits, ids, s.top_p)
        ids = min_p(logits, ids, s.min_p)
        return int(ids[pick(_weights(logits[ids], s.temperature), self._random.random())])


def penalize_repeats(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive logits of recent tokens by `penalty`, multiply others (Keskar et al. 2019, section 4.1).

    However often a token was seen, once. Multiplying is llama.cpp's and everybody's correction of the paper, where a
    penalty made negative logits more probable. The result is float64 where anything changes.
    """
    if penalty == 1.0 or not len(recent):
        return logits
    logits = logits.astype(np.float64)  # a copy, and wide enough for any finite float32 times a penalty
    ids = np.asarray(recent)
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest logits, largest first, lower id first among equals; all of them for k <= 0."""
    if 0 < k < logits.size:
        least = np.partition(logits, -k)[-k]
        ids = np.flatnonzero(logits >= least)
    else:
        ids = np.arange(logits.size)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids[:k] if k > 0 else ids


def top_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """The fewest of `ids` (largest logit first) whose probability among them reaches p; at least one."""
    if p >= 1.0:
        return ids
    reached = np.cumsum(_weights(logits[ids]))
    return ids[: min(int(np.searchsorted(reached, p * reached[-1])) + 1, ids.size)]


def min_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """Those of `ids` (largest logit first) at least p times as probable as the first."""
    if p <= 0.0:
        return ids
    return ids[_below_first(logits[ids]) >= math.log(p)]


def pick(weights: np.ndarray, uniform: float) -> int:
    """The place in `weights`, not all 0, that `uniform`, of [0, 1), falls on; never one whose weight is 0."""
    reached = np.cumsum(weights)
    # `uniform` is at most 1 - 2**-53, so the product is rounded to less than the sum: a place where the sum grows
    return int(np.searchsorted(reached, uniform * reached[-1], side="right"))


def _weights(values: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities of `values` (largest first) before division by their sum: float64, the first is 1."""
    with np.errstate(over="ignore"):  # a temperature close to 0 makes them -inf, which is right
        weights: np.ndarray = np.exp(_below_first(values) / temperature)
    return weights


def _below_first(values: np.ndarray) -> np.ndarray:
    difference: np.ndarray = values.astype(np.float64) - float(values[0])
    return difference
