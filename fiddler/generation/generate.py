"""The decoding loop: a prompt's ids in, a stream of ids out. Knows no text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fiddler.errors import FileFormatError
from fiddler.runtime.kv_cache import KVCache
from fiddler.runtime.runner import Runner
from fiddler.sampling.sampler import Sampler

__all__ = ["choose", "finite", "generate"]


def generate(
    runner: Runner,
    sequence: KVCache,
    prompt: Sequence[int],
    sampler: Sampler,
    limit: int,
    on_chunk: Callable[[int], None] = lambda read: None,
) -> Iterator[int]:
    """Read `prompt` into `sequence`, which may hold a prefix of it already, but not all of it; then yield up to `limit`
    tokens. The model computes a token only when the caller requests the next one.

    Ends by itself only at `limit`, or where the sampler is finished: the caller knows the end tokens.
    on_chunk: see `Runner.prefill`. Raises FileFormatError where the model computes a logit that is not finite.
    """
    history = list(prompt)
    logits = runner.prefill(sequence, history[sequence.length :], on_chunk)
    for produced in range(limit):
        if sampler.finished:
            return
        if produced:
            output = runner.step([(sequence, history[-1:])])
            assert output.logits is not None
            logits = output.logits[0]
        token = choose(logits.numpy(), history, sampler)
        history.append(token)
        yield token


def choose(logits: np.ndarray, history: Sequence[int], sampler: Sampler) -> int:
    """The token that follows `history`, after which the model computes `logits` [V].

    Raises FileFormatError where a logit is not finite.
    """
    return sampler(finite(logits, len(history)), history)


def finite(logits: np.ndarray, position: int) -> np.ndarray:
    """`logits`, if all are finite; else raises FileFormatError. `position`: number of tokens before them."""
    if not np.isfinite(logits).all():
        raise FileFormatError(
            f"the model computes {logits[~np.isfinite(logits)][0]} after {position} tokens: a weight or an "
            "activation is beyond 16 bits; try --precision exact, or convert the original checkpoint again as bf16"
        )
    return logits
