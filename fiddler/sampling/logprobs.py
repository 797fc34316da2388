"""Log-probabilities of a chosen token and of the most probable ones. Knows logits only.

They are those of the model itself, as llama.cpp's server and OpenAI give them: the softmax of its logits before a
constraint, a bias, a penalty or the temperature changed anything. So a token that one of these ruled out may be among
the most probable ones, and the chosen token need not be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["LogProbs", "largest", "log_probs", "log_softmax"]

_BLOCKS = 16  # for each value that is looked for


@dataclass(frozen=True)
class LogProbs:
    """One step: the chosen `token`, its natural logarithm of probability, and (token, logprob) of the most probable
    tokens, the most probable first, the lowest id first among equal logits.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probs(logits: np.ndarray, token: int, count: int) -> LogProbs:
    """`LogProbs` of `token` and of the `count` most probable tokens, from the model's logits [V]."""
    values = log_softmax(logits)
    ids = largest(logits, count)  # not of `values`: nearly equal logits are equal there
    return LogProbs(token, float(values[token]), tuple(zip(ids.tolist(), values[ids].tolist(), strict=True)))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest of `values` [N], largest first, of equal values the lower index first.

    All indices where `count` is N or more.
    """
    indices = _above(values, count) if 0 < count < values.size else np.arange(values.size)
    return indices[np.argsort(-values[indices], kind="stable")][:count]


def _above(values: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending, of the values that are no smaller than the `count`-th largest.

    To partition all values takes 1 ms for a vocabulary of 150,000. So blocks first: at least `count` values reach the
    `count`-th largest of the blocks' maxima, and few others do.
    """
    size = values.size // (_BLOCKS * count)  # of a block
    if size < 2:
        return np.flatnonzero(values >= np.partition(values, -count)[-count])
    maxima = values[: values.size // size * size].reshape(-1, size).max(1)
    indices = np.flatnonzero(values >= np.partition(maxima, -count)[-count])
    candidates = values[indices]
    above: np.ndarray = indices[candidates >= np.partition(candidates, -count)[-count]]
    return above


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [..., V], the largest of them finite -> log-probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
