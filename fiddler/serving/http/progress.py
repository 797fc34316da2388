"""What is known of one text while it comes: tokens, times, log-probabilities. Knows events; no protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fiddler.generation.completion import Completion
from fiddler.generation.events import Finished, Joined, PromptRead, Token
from fiddler.sampling.logprobs import LogProbs
from fiddler.serving.worker import Delivery

__all__ = ["Progress", "texts_of"]


class Progress:
    """Follows the events of one text. Times are those of the steps, by time.perf_counter."""

    def __init__(self) -> None:
        self.cached = self.total = self.read = 0  # tokens of the prompt
        self.tokens: list[int] = []
        self.probs: list[LogProbs] = []
        self.completion: Completion | None = None  # once it has ended
        self._joined: float | None = None
        self._first: float | None = None
        self._last = 0.0

    @property
    def joined(self) -> bool:
        """Whether it has been scheduled."""
        return self._joined is not None

    def see(self, delivery: Delivery) -> None:
        """Take in the next event."""
        event, at = delivery.event, delivery.at
        if isinstance(event, Joined):
            if self._joined is None:
                self.cached, self.total, self._joined = event.cached, event.total, at
            self.read = event.cached
        elif isinstance(event, PromptRead):
            self.read = event.read
        elif isinstance(event, Token):
            self.tokens.append(event.token)
            self._first = at if self._first is None else self._first
            if event.log_probs is not None:
                self.probs.append(event.log_probs)
        elif isinstance(event, Finished):
            assert isinstance(event.result, Completion)
            self.completion = event.result
        self._last = at

    def prompt_progress(self) -> dict[str, Any]:
        """How far the prompt is read, as llama.cpp's server tells it."""
        seconds = 0.0 if self._joined is None else self._last - self._joined
        return {"total": self.total, "cache": self.cached, "processed": self.read, "time_ms": int(1e3 * seconds)}

    def timings(self) -> dict[str, Any]:
        """Numbers of tokens and times [ms] so far, as llama.cpp's server has them.

        The first token comes with the prompt's last step: generation is the time after it, of all tokens but it.
        """
        count, more = self.read - self.cached, max(len(self.tokens) - 1, 0)
        joined = self._last if self._joined is None else self._joined
        prompt = 1e3 * ((self._last if self._first is None else self._first) - joined)
        generation = 0.0 if self._first is None else 1e3 * (self._last - self._first)
        return {
            "cache_n": self.cached,
            "prompt_n": count,
            "prompt_ms": prompt,
            "prompt_per_token_ms": prompt / count if count else 0.0,
            "prompt_per_second": 1e3 * count / prompt if prompt else 0.0,
            "predicted_n": len(self.tokens),
            "predicted_ms": generation,
            "predicted_per_token_ms": generation / more if more else 0.0,
            "predicted_per_second": 1e3 * more / generation if generation else 0.0,
        }


def texts_of(tokens: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text of tokens, control tokens by name."""
    return b"".join(pieces[token] for token in tokens).decode("utf-8", "replace")
