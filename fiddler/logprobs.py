"""Log-probabilities of a chosen token and of the most probable ones. Knows logits only.

They are those of the model itself, as llama.cpp's server and OpenAI give them: the softmax of its logits before a
constraint, a bias, a penalty or the temperature changed anything. What one of these ruled out can stand among the most
probable, and the chosen token need not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LogProbs", "log_probs", "log_softmax"]


@dataclass(frozen=True)
class LogProbs:
    """One step: the chosen `token`, its natural logarithm of probability, and (token, logprob) of the most probable
    tokens, the most probable first, the lowest id first among equal logits.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probs(logits: np.ndarray, token: int, count: int) -> LogProbs:
    """Of `token` and of the `count` most probable ones, given the logits [V] of the model."""
    values = log_softmax(logits)
    count = min(count, logits.size)
    least = np.partition(logits, -count)[-count] if count else np.inf
    ids = np.flatnonzero(logits >= least)
    ids = ids[np.argsort(-logits[ids], kind="stable")][:count]  # not by `values`: logits nearly equal are one there
    return LogProbs(token, float(values[token]), tuple(zip(ids.tolist(), values[ids].tolist(), strict=True)))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [..., V], of which some are finite -> log-probabilities, float64."""
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return result
