"""Results: a finished text with its times and memory, the beams of a search, and a text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fiddler.generation.stop_strings import StopText
from fiddler.sampling.logprobs import LogProbs
from fiddler.text.tokenizer import Tokenizer

__all__ = ["Beam", "BeamResult", "Completion", "FinishReason", "Reply", "Stats"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Stats:
    """Times [s] of a generation, and memory [bytes] of the whole process."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generation_seconds: float
    peak_resident: int  # includes the parts of the mapped file that were touched
    anonymous: int  # memory of the process's own, at the end
    cached_tokens: int = 0  # of the prompt, whose keys and values were cached before

    @property
    def prompt_speed(self) -> float:
        """Prompt tokens a second, of those that were computed."""
        return (self.prompt_tokens - self.cached_tokens) / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generation_speed(self) -> float:
        """Generated tokens a second, after the first, which the prompt's time includes."""
        more = max(self.generated_tokens - 1, 0)
        return more / self.generation_seconds if self.generation_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    `finish_reason`: "stop" (end token, stop string, or a constraint that is met) or "length". `log_probs`: one entry a
    token where the sampling's `n_probs` is above 0; of the model's own distribution, see `logprobs.py`. `stop_string`:
    the one that ended the text; empty where none did.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    log_probs: tuple[LogProbs, ...] = ()
    stop_string: str = ""


@dataclass(frozen=True)
class Beam:
    """A finished beam. `score`: the sum of log-probabilities over (number of tokens) ** length_penalty.

    `tokens` include the end token or the tokens of the stop string, `text` does not.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    finish_reason: FinishReason


@dataclass(frozen=True)
class BeamResult:
    """The finished beams of a search, best first. `stats.generated_tokens` are those of one beam: the steps."""

    beams: tuple[Beam, ...]
    stats: Stats


class Reply:
    """The text of a generation as its tokens come, until an end token, a stop string or `limit` tokens."""

    def __init__(
        self, tokenizer: Tokenizer, limit: int, stop: Sequence[str], named_tokens: frozenset[int] = frozenset()
    ) -> None:
        """named_tokens: control tokens that stand in the text by their names."""
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None if limit else "length"  # None while it goes on
        self._ends, self._limit = tokenizer.end_ids, limit
        self._stream, self._stop = tokenizer.stream(True, named_tokens), StopText(stop)
        self._text: list[str] = []

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._text)

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; empty where none did."""
        return self._stop.string

    def push(self, token: int, *, last: bool = False) -> str:
        """Append a token: the text that it makes certain, maybe none. The last token releases all that was held back.

        last: no other token can follow.
        """
        assert self.finish_reason is None, "the reply has ended"
        self.tokens.append(token)
        ended = token in self._ends
        piece = "" if ended else self._stop.push(self._stream.push(token))
        if ended or last or self._stop.found or len(self.tokens) == self._limit:
            piece += self._stop.push(self._stream.finish()) + self._stop.finish()
            self.finish_reason = "stop" if ended or last or self._stop.found else "length"
        self._text.append(piece)
        return piece

    def end(self) -> None:
        """End an empty reply: not even a first token can be chosen."""
        assert not self.tokens
        self.finish_reason = "stop"
