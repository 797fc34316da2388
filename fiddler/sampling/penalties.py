"""Logit biases and penalties, applied before any token is left out: pure functions on logits, in llama.cpp's terms.

Biases by id; repeat, frequency and presence penalties; DRY, which penalises continuing a run of tokens as it continued
before. Defined as in `llama-sampler.cpp` of https://github.com/ggml-org/llama.cpp. None of them changes its argument; a
result that differs from it in more than banned tokens is float64, wide enough for any finite float32. They know no
model; of text only the bytes of each token, and only where DRY looks for its breakers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

__all__ = ["add_bias", "lately", "penalize_repeats", "penalize_runs", "since_breaker"]

_LARGEST = math.log(np.finfo(np.float32).max)


def lately(tokens: Sequence[int], count: int) -> Sequence[int]:
    """The last `count` of `tokens`; -1 for all."""
    return tokens if count < 0 else tokens[len(tokens) - min(len(tokens), count) :]


def add_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Add to the logits of single tokens; -inf bans one."""
    if not bias:
        return logits
    if all(value == -math.inf for value in bias.values()):
        logits = logits.copy()
        logits[list(bias)] = -math.inf
        return logits
    logits = logits.astype(np.float64)
    logits[list(bias)] += list(bias.values())
    return logits


def penalize_repeats(
    logits: np.ndarray, recent: Sequence[int], penalty: float, presence: float = 0.0, frequency: float = 0.0
) -> np.ndarray:
    """Divide positive logits of recent tokens by `penalty`, multiply others (Keskar et al. 2019, section 4.1), then
    subtract `presence` once, and `frequency` as often as the token occurs.

    However often a token occurs, `penalty` counts once. Multiplying is llama.cpp's and everybody's correction of the
    paper, where a penalty made negative logits more probable.
    """
    if (penalty == 1.0 and presence == 0.0 and frequency == 0.0) or not len(recent):
        return logits
    logits = logits.astype(np.float64)
    ids, counts = np.unique(np.asarray(recent), return_counts=True)
    chosen = logits[ids]
    logits[ids] = np.where(chosen > 0, chosen / penalty, chosen * penalty) - (counts * frequency + presence)
    return logits


def penalize_runs(
    logits: np.ndarray,
    recent: Sequence[int],
    multiplier: float,
    base: float,
    allowed_length: int,
    pieces: Sequence[bytes] = (),
    breakers: Sequence[bytes] = (),
) -> np.ndarray:
    """DRY ("don't repeat yourself"): subtract multiplier * base ** (n - allowed_length) from every token that would
    continue a run of n >= allowed_length tokens as it continued before, n the longest such run.

    A run is a sequence of tokens that ends `recent` and occurs in it before; it never reaches back over a breaker, and
    a token that itself holds one is not penalised. `pieces`: the bytes of each token, needed where there are breakers.
    """
    if multiplier == 0.0 or len(recent) <= allowed_length:
        return logits
    tokens = np.asarray(recent)
    runs = dict.fromkeys(tokens[1:].tolist(), 0) if allowed_length == 0 else {}  # token -> the longest run before it
    ends = np.arange(tokens.size - 1)  # where an earlier occurrence of the last `length` tokens ends
    for length in range(1, since_breaker(recent, pieces, breakers) + 1):
        ends = ends[ends >= length - 1]
        ends = ends[tokens[ends - (length - 1)] == tokens[-length]]
        if not ends.size:
            break
        if length >= allowed_length:
            runs.update(dict.fromkeys(tokens[ends + 1].tolist(), length))
    runs = {token: n for token, n in runs.items() if not any(breaker in pieces[token] for breaker in breakers)}
    if not runs:
        return logits
    logits = logits.astype(np.float64)
    # no power beyond float32: the penalty is decisive long before
    max_exponent = _LARGEST / math.log(base) if base > 1.0 else math.inf
    for token, length in runs.items():
        logits[token] -= multiplier * base ** min(length - allowed_length, max_exponent)
    return logits


def since_breaker(recent: Sequence[int], pieces: Sequence[bytes], breakers: Sequence[bytes]) -> int:
    """How many of the last tokens come after the last breaker in their text; all of them where there is none.

    Breakers are searched in the bytes of the tokens, wherever token boundaries lie: llama.cpp, too, finds a breaker
    inside a token or across several, but tokenizes the rest of it in one way only.
    """
    if not breakers:
        return len(recent)
    text = b"".join([pieces[token] for token in recent])
    end = max((at + len(breaker) for breaker in breakers if (at := text.rfind(breaker)) >= 0), default=0)
    begin, count = len(text), 0
    for token in reversed(recent):
        begin -= len(pieces[token])
        if begin < end:
            break
        count += 1
    return count
