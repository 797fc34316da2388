"""Log-probabilities of a chosen token and of the most probable ones. Knows logits only.

They are those of the model itself, as llama.cpp's server and OpenAI give them: the softmax of its logits before a
constraint, a bias, a penalty or the temperature changed anything. What one of these ruled out can stand among the most
probable, and the chosen token need not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LogProbs", "largest", "log_probs", "log_softmax"]


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
    ids = largest(logits, count)  # not of `values`: logits nearly equal are one there
    return LogProbs(token, float(values[token]), tuple(zip(ids.tolist(), values[ids].tolist(), strict=True)))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest of `values` [N], all where there are fewer; the lower place first among equals."""
    if 0 < count < values.size:
        places = np.flatnonzero(values >= np.partition(values, -count)[-count])
    else:
        places = np.arange(values.size)
    return places[np.argsort(-values[places], kind="stable")][:count]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [..., V], of which some are finite -> log-probabilities, float64."""
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return result
