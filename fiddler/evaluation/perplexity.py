"""Perplexity of a text, as llama.cpp's `llama-perplexity` measures it. Knows token ids and steps; no text, no file.

The text's tokens are cut into windows that do not overlap. Each is read without context, its first token replaced by
BOS where the model adds one. The tokens behind its middle are scored: they have at least half a window before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fiddler.errors import FileFormatError, RequestError
from fiddler.runtime.runner import Runner

__all__ = ["Estimate", "cut", "losses", "measure"]

_LOGITS = 128  # positions whose logits are computed at once
_MAX_LOSS = 709.0  # [nats]; its exponential still fits in float64


@dataclass(frozen=True)
class Estimate:
    """The estimate from the windows so far: sums over the scored tokens of their losses [nats]."""

    windows: int = 0
    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, losses: np.ndarray) -> Estimate:
        """The estimate with one more window, whose scored tokens have these losses: float64 [n]."""
        return Estimate(
            self.windows + 1,
            self.tokens + len(losses),
            self.total + float(losses.sum()),
            self.squares + float(losses @ losses),
        )

    @property
    def perplexity(self) -> float:
        """e to the mean loss."""
        mean = self.total / self.tokens
        return math.exp(mean) if mean < _MAX_LOSS else math.inf

    @property
    def standard_error(self) -> float:
        """Of the perplexity, to first order: the perplexity times the standard error of the mean loss.

        As in llama-perplexity, the tokens count as independent.
        """
        mean = self.total / self.tokens
        variance = max(0.0, self.squares / self.tokens - mean * mean)
        return self.perplexity * math.sqrt(variance / max(1, self.tokens - 1))


def cut(ids: Sequence[int], context: int) -> list[Sequence[int]]:
    """Windows of `context` ids each; the ids behind the last whole window are not used.

    Raises RequestError where there are fewer than two, as llama-perplexity does.
    """
    if len(ids) < 2 * context:
        raise RequestError(
            f"the text has {len(ids)} tokens; windows of {context} need at least {2 * context}: give more text or a "
            "smaller --ctx"
        )
    return [ids[begin : begin + context] for begin in range(0, len(ids) - context + 1, context)]


def losses(logits: Tensor, following: Sequence[int]) -> np.ndarray:
    """Negative log-likelihoods [nats]: logits float32 [n, V] and the ids that followed, [n] -> float64 [n]."""
    wide = logits.double()
    chosen = wide.gather(1, torch.tensor(following, dtype=torch.int64)[:, None])[:, 0]
    result: np.ndarray = (torch.logsumexp(wide, 1) - chosen).numpy()
    return result


def measure(runner: Runner, windows: Sequence[Sequence[int]], bos: int | None) -> Iterator[Estimate]:
    """Score windows of one length, at most the runner's context; yields the estimate so far after each of them.

    Of a window of c tokens those behind position c // 2 are scored, each by the logits at the position before it.
    bos: replaces each window's first token; None: the token stays. A step reads as many windows as its chunk holds.
    Raises FileFormatError where a loss is not finite.
    """
    context = len(windows[0])
    wanted = max(1, min(runner.chunk, runner.context) // context)
    sequences = runner.sequences(min(wanted, len(windows)), context)
    windows_per_step = len(sequences)
    estimate = Estimate()
    for first in range(0, len(windows), windows_per_step):
        group = windows[first : first + windows_per_step]
        inputs = [window if bos is None else [bos, *window[1:]] for window in group]
        window_losses: list[list[np.ndarray]] = [[] for _ in group]
        for sequence in sequences:
            sequence.truncate(0)
        for begin in range(0, context, runner.chunk):
            end = min(begin + runner.chunk, context)
            step_parts = [(sequence, ids[begin:end]) for sequence, ids in zip(sequences, inputs, strict=False)]
            hidden = runner.step(step_parts, logits=False).hidden
            for index, window in enumerate(group):
                row = index * (end - begin) - begin  # of the window's first position
                scored = range(max(begin, context // 2), min(end, context - 1))
                for position in range(scored.start, scored.stop, _LOGITS):
                    until = min(position + _LOGITS, scored.stop)
                    logits = runner.logits(hidden[row + position : row + until])
                    window_losses[index].append(losses(logits, window[position + 1 : until + 1]))
        for parts in window_losses:
            estimate = estimate.plus(np.concatenate(parts))
            if not math.isfinite(estimate.total):
                raise FileFormatError(
                    f"the model computes what is no number in window {estimate.windows}: a weight is NaN or infinite, "
                    "or an activation is beyond 16 bits; try --precision exact, or convert again as bf16"
                )
            yield estimate
