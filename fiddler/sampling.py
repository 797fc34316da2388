"""Choosing the next token: pure functions on logits, with llama.cpp's names, defaults and order.

Order: repeat penalty, top-k, top-p, min-p, temperature last. Knows no model and no text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fiddler.errors import RequestError

__all__ = ["Sampler", "Sampling", "min_p", "penalize_repeats", "top_k", "top_p"]


@dataclass(frozen=True)
class Sampling:
    """How to choose. Raises RequestError when a value is out of range.

    `temperature` 0: the most probable token. `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1: off.
    `repeat_last_n`: how many of the last tokens are penalised, -1 for all. `seed` None: a new one each time.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, math.inf),
            ("top_k", self.top_k, 0, math.inf),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_last_n", self.repeat_last_n, -1, math.inf),
            ("seed", 0 if self.seed is None else self.seed, 0, 2**64 - 1),
        ):
            if not low <= value <= high or math.isinf(value):
                raise RequestError(f"{name} is {value}; it must lie between {low} and {high}")
        if not (math.isfinite(self.repeat_penalty) and self.repeat_penalty > 0):
            raise RequestError(f"repeat_penalty is {self.repeat_penalty}; it must be positive")


class Sampler:
    """A `Sampling` with its random state: one a generation."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: np.ndarray, recent: Sequence[int]) -> int:
        """Choose a token from float32 logits [V], given the tokens so far."""
        s = self.sampling
        last = recent if s.repeat_last_n < 0 else recent[len(recent) - min(len(recent), s.repeat_last_n) :]
        logits = penalize_repeats(logits, last, s.repeat_penalty)
        if s.temperature == 0:
            return int(logits.argmax())
        ids = top_k(logits, s.top_k)
        ids = top_p(logits, ids, s.top_p)
        ids = min_p(logits, ids, s.min_p)
        chances = _softmax(logits[ids].astype(np.float64) / s.temperature)
        drawn = np.searchsorted(np.cumsum(chances), self._random.random(), side="right")
        return int(ids[min(int(drawn), ids.size - 1)])


def penalize_repeats(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive logits of recent tokens by `penalty`, multiply negative ones (Keskar et al. 2019, CTRL)."""
    if penalty == 1.0 or not len(recent):
        return logits
    logits = logits.copy()
    ids = np.unique(np.asarray(recent))
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
    return logits


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest logits, largest first, lower id first among equals; all of them for k = 0."""
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
    reached = np.cumsum(_softmax(logits[ids].astype(np.float64)))
    return ids[: min(int(np.searchsorted(reached, p)) + 1, ids.size)]


def min_p(logits: np.ndarray, ids: np.ndarray, p: float) -> np.ndarray:
    """Those of `ids` (largest logit first) at least p times as probable as the first."""
    if p <= 0.0:
        return ids
    return ids[logits[ids] >= logits[ids[0]] + math.log(p)]


def _softmax(values: np.ndarray) -> np.ndarray:
    raised = np.exp(values - values.max())
    result: np.ndarray = raised / raised.sum()
    return result
