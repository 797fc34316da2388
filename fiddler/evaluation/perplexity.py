"""Perplexity of a text, as llama.cpp's `llama-perplexity` measures it. Knows token ids and steps; no text, no file.

The text's tokens are cut into windows that do not overlap. Each is read from nothing, its first token replaced by BOS
where the model adds one, and the tokens behind its middle are scored, which have at least half a window before them.
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
_MOST = 709.0  # nats, whose exponential is still a float64


@dataclass(frozen=True)
class Estimate:
    """What the windows so far give: sums over the scored tokens of their losses, in nats."""

    windows: int = 0
    tokens: int = 0
    total: float = 0.0
    squares: float = 0.0

    def plus(self, losses: np.ndarray) -> Estimate:
        """With one more window, whose tokens have these losses: float64 [n]."""
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
        return math.exp(mean) if mean < _MOST else math.inf

    @property
    def standard_error(self) -> float:
        """Of the perplexity, to first order: itself times the standard error of the mean loss.

        As llama-perplexity has it, which takes the tokens for independent.
        """
        mean = self.total / self.tokens
        variance = max(0.0, self.squares / self.tokens - mean * mean)
        return self.perplexity * math.sqrt(variance / max(1, self.tokens - 1))


def cut(ids: Sequence[int], context: int) -> list[Sequence[int]]:
    """Windows of `context` ids each; what is left behind the last is not used.

    Raises RequestError where there are fewer than two, as llama-perplexity does.
    """
    if len(ids) < 2 * context:
        raise RequestError(
            f"the text has {len(ids)} tokens; windows of {context} need at least {2 * context}: give more text or a "
            "smaller --ctx"
        )
    return [ids[begin : begin + context] for begin in range(0, len(ids) - context + 1, context)]


def losses(logits: Tensor, following: Sequence[int]) -> np.ndarray:
    """Negative log-likelihoods, in nats: logits float32 [n, V] and the ids that did follow, [n] -> float64 [n]."""
    wide = logits.double()
    chosen = wide.gather(1, torch.tensor(following, dtype=torch.int64)[:, None])[:, 0]
    made: np.ndarray = (torch.logsumexp(wide, 1) - chosen).numpy()
    return made


def measure(runner: Runner, windows: Sequence[Sequence[int]], bos: int | None) -> Iterator[Estimate]:
    """Score windows of one length, at most the runner's context; the estimate so far after each of them.

    Of a window of c tokens those behind position c // 2 are scored, each by the logits at the position before it.
    bos: what each window's first token is replaced by, or None. As many windows are read in one step as a step may
    hold. Raises FileFormatError where the model computes something that is no number.
    """
    context = len(windows[0])
    together = max(1, min(runner.chunk, runner.context) // context)
    home = runner.sequence()
    sequences = home.divided(min(together, len(windows)), context)
    estimate = Estimate()
    for first in range(0, len(windows), together):
        group = windows[first : first + together]
        given = [window if bos is None else [bos, *window[1:]] for window in group]
        found: list[list[np.ndarray]] = [[] for _ in group]
        for sequence in sequences:
            sequence.truncate(0)
        for begin in range(0, context, runner.chunk):
            end = min(begin + runner.chunk, context)
            hidden = runner.step([(sequence, ids[begin:end]) for sequence, ids in zip(sequences, given, strict=False)])
            for index, window in enumerate(group):
                row = index * (end - begin) - begin  # of the window's first position
                asked = range(max(begin, context // 2), min(end, context - 1))
                for part in range(asked.start, asked.stop, _LOGITS):
                    until = min(part + _LOGITS, asked.stop)
                    logits = runner.logits(hidden[row + part : row + until])
                    found[index].append(losses(logits, window[part + 1 : until + 1]))
        for some in found:
            estimate = estimate.plus(np.concatenate(some))
            if not math.isfinite(estimate.total):
                raise FileFormatError(
                    f"the model computes what is no number in window {estimate.windows}: a weight or an activation is "
                    "beyond 16 bits; try --precision exact, or convert the original checkpoint again as bf16"
                )
            yield estimate
